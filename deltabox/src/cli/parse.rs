//! Values on the command line. Pure.

use std::path::PathBuf;

use crate::sandbox::spec::parse_name;
use crate::sandbox::{BaseRef, SandboxId};

/// Bytes, with K, M, G or T for powers of 1024.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "a number, with K, M, G or T if wanted: 512M".to_owned())?;
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(|| "out of range".to_owned())
}

/// `KEY=VALUE`.
pub(super) fn parse_env(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        _ => Err("KEY=VALUE".to_owned()),
    }
}

/// `host`, a directory (with a slash or a leading dot, made absolute), or the name of an image.
pub(super) fn parse_base(text: &str) -> Result<BaseRef, String> {
    if text == "host" {
        Ok(BaseRef::default())
    } else if text.contains('/') || text.starts_with('.') {
        parse_path(text).map(|path| BaseRef::Dir { path })
    } else {
        parse_name(text).map(|name| BaseRef::Image { name }).map_err(|error| error.to_string())
    }
}

/// A sandbox, or one of its checkpoints: `dev`, `dev@c3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) sandbox: SandboxId,
    pub(super) checkpoint: Option<String>,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.checkpoint {
            None => self.sandbox.fmt(f),
            Some(checkpoint) => write!(f, "{}@{checkpoint}", self.sandbox),
        }
    }
}

/// `SANDBOX` or `SANDBOX@CHECKPOINT`; ids of checkpoints follow the rule of names.
pub(super) fn parse_target(text: &str) -> Result<Target, String> {
    let (sandbox, checkpoint) = match text.split_once('@') {
        Some((sandbox, checkpoint)) => (sandbox, Some(checkpoint)),
        None => (text, None),
    };
    let sandbox = parse_name(sandbox).and_then(|name| name.parse()).map_err(|error| error.to_string())?;
    let checkpoint = checkpoint.map(parse_name).transpose().map_err(|error| error.to_string())?;
    Ok(Target { sandbox, checkpoint })
}

/// The id or name of a checkpoint.
pub(super) fn parse_checkpoint(text: &str) -> Result<String, String> {
    parse_name(text).map_err(|error| error.to_string())
}

/// A path, made absolute: the daemon has another working directory.
pub(super) fn parse_path(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| error.to_string())
}

/// The name of an image.
pub(super) fn parse_image(text: &str) -> Result<String, String> {
    parse_name(text).map_err(|error| error.to_string())
}

/// `UID` or `UID:GID`, as numbers: names are the sandbox's own business.
pub(super) fn parse_user(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| "UID or UID:GID, as numbers".to_owned());
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid)?, Some(number(gid)?))),
        None => Ok((number(text)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_a_suffix() {
        for (text, n) in [("1", 1), ("4k", 4096), ("512M", 512 << 20), ("2G", 2 << 30), ("1T", 1 << 40)] {
            assert_eq!(parse_bytes(text), Ok(n));
        }
        for bad in ["", "K", "0", "-1", "1.5G", "1KB", "99999999999T", "é"] {
            assert!(parse_bytes(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_base_is_the_host_a_directory_or_an_image() {
        assert_eq!(parse_base("host"), Ok(BaseRef::Host { with: vec![] }));
        assert_eq!(parse_base("/srv/base"), Ok(BaseRef::Dir { path: "/srv/base".into() }));
        let Ok(BaseRef::Dir { path }) = parse_base(".") else { panic!("no directory") };
        assert_eq!(path, std::env::current_dir().unwrap());
        assert_eq!(parse_base("debian-12"), Ok(BaseRef::Image { name: "debian-12".into() }));
        assert!(parse_base("Debian").is_err());
    }

    #[test]
    fn a_user_is_numbers() {
        assert_eq!(parse_user("1000"), Ok((1000, None)));
        assert_eq!(parse_user("1000:50"), Ok((1000, Some(50))));
        for bad in ["", ":", "1:", "root", "-1", "1:2:3"] {
            assert!(parse_user(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_environment_entry_has_a_name() {
        assert!(parse_env("A=").is_ok() && parse_env("A=b=c").is_ok());
        assert!(parse_env("A").is_err() && parse_env("=b").is_err());
    }
}
