//! What a command is asked to be: whether it makes sense, and the environment it gets.

use super::Error;
use super::api::{ExecRequest, Stdio};

/// Unless the sandbox or the command says otherwise.
const DEFAULT_ENV: [&str; 2] = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"];

/// Refuses what init could not carry out, or what no user means.
pub(super) fn check(request: &ExecRequest) -> Result<(), Error> {
    let invalid = |what, why: &str| Err(Error::Invalid { what, why: why.to_owned() });
    let texts = request.argv.iter().chain(&request.env).chain(&request.cwd);
    if texts.into_iter().any(|text| text.contains('\0')) {
        return invalid("argv, env or cwd", "a NUL byte cannot be part of it");
    }
    if request.argv.is_empty() {
        return invalid("argv", "no program given");
    }
    if request.env.iter().any(|pair| !pair.contains('=')) {
        return invalid("env", "give KEY=VALUE");
    }
    let n_ids = crate::sandbox::idmap::N_IDS;
    if request.uid >= n_ids || request.gid.is_some_and(|gid| gid >= n_ids) {
        return invalid("user", "users and groups inside are 0 to 65535");
    }
    if request.cwd.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
        return invalid("cwd", "give an absolute directory");
    }
    Ok(())
}

/// Defaults, the sandbox's, the command's: a later one wins.
pub(super) fn environment(sandbox: &[String], request: &ExecRequest) -> Vec<String> {
    let home = if request.uid == 0 { "HOME=/root" } else { "HOME=/" };
    let term = matches!(request.stdio, Stdio::Pty { .. }).then_some("TERM=xterm");
    let defaults = DEFAULT_ENV.into_iter().chain([home]).chain(term).map(str::to_owned);
    let mut env: Vec<String> = Vec::new();
    for pair in defaults.chain(sandbox.iter().cloned()).chain(request.env.iter().cloned()) {
        let key = pair.split_once('=').map_or(pair.as_str(), |(key, _)| key).to_owned();
        match env.iter_mut().find(|old| old.split_once('=').is_some_and(|(old, _)| old == key)) {
            Some(old) => *old = pair,
            None => env.push(pair),
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::OnDisconnect;

    fn request() -> ExecRequest {
        ExecRequest {
            argv: vec!["sh".to_owned()],
            env: vec!["PATH=/x".to_owned(), "A=2".to_owned()],
            cwd: None,
            uid: 0,
            gid: None,
            stdio: Stdio::Log,
            on_disconnect: OnDisconnect::End,
        }
    }

    #[test]
    fn the_commands_environment_wins_over_the_sandboxs_over_the_default() {
        let env = environment(&["A=1".to_owned(), "B=1".to_owned()], &request());
        assert_eq!(env, ["PATH=/x", "LANG=C.UTF-8", "HOME=/root", "A=2", "B=1"]);
    }

    #[test]
    fn requests_that_make_no_sense_are_refused_before_init_sees_them() {
        assert!(check(&request()).is_ok());
        let bad: [fn(&mut ExecRequest); 6] = [
            |r| r.argv.clear(),
            |r| r.argv.push("a\0b".to_owned()),
            |r| r.env.push("novalue".to_owned()),
            |r| r.uid = 65_536,
            |r| r.gid = Some(u32::MAX),
            |r| r.cwd = Some("tmp".to_owned()),
        ];
        for spoil in bad {
            let mut request = request();
            spoil(&mut request);
            assert!(matches!(check(&request), Err(Error::Invalid { .. })), "{request:?} was taken");
        }
    }
}
