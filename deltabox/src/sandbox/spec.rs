//! What a sandbox is asked to be: its name, base, network and limits. Pure data, checked at the edge.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The name of a sandbox, unique in its store: also its hostname and its directory's name.
///
/// 1 to 63 characters of `a-z`, `0-9` and `-`, beginning and ending with a letter or digit
/// (a hostname label of RFC 1123, so that it can be one).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// Why a text is not the name of a sandbox or of an imported base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a name: 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit")]
pub struct BadName {
    /// What was given.
    pub text: String,
}

impl SandboxId {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        parse_name(text).map(Self)
    }
}

/// Checks a name by the rule of [`SandboxId`]; bases and prefixes follow the same rule.
pub fn parse_name(text: &str) -> Result<String, BadName> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good =
        (1..=63).contains(&text.len()) && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-');
    if good { Ok(text.to_owned()) } else { Err(BadName { text: text.to_owned() }) }
}

impl TryFrom<String> for SandboxId {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> String {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The read-only root file system a sandbox starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum BaseRef {
    /// An allow-list of the machine's own root, plus the directories in `with`.
    Host {
        /// Absolute host directories that are to exist inside at the same path.
        #[serde(default)]
        #[schema(value_type = Vec<String>)]
        with: Vec<PathBuf>,
    },
    /// A directory of the host, used as it is.
    Dir {
        /// Absolute path of the directory.
        #[schema(value_type = String)]
        path: PathBuf,
    },
    /// A base imported under a name (`image import`).
    Image {
        /// The name it was imported under.
        name: String,
    },
}

impl Default for BaseRef {
    fn default() -> Self {
        Self::Host { with: Vec::new() }
    }
}

impl fmt::Display for BaseRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { .. } => f.write_str("host"),
            Self::Dir { path } => write!(f, "{}", path.display()),
            Self::Image { name } => f.write_str(name),
        }
    }
}

/// Which network a sandbox sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Net {
    /// A network of its own with nothing but loopback.
    #[default]
    None,
    /// The host's own network.
    Host,
}

/// What a sandbox may use at most; `None` is no limit of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// Memory in bytes (page cache of its files included).
    pub memory_bytes: Option<u64>,
    /// Processes and threads together, init included.
    pub n_pids: Option<u64>,
}

/// What templates may take at most; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolBounds {
    /// How many.
    pub n_templates: Option<usize>,
    /// Their memory, bytes (PSS).
    pub bytes: Option<u64>,
}

/// Everything `create` is told about a sandbox apart from its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SandboxSpec {
    /// What its root file system starts from.
    #[serde(default)]
    pub base: BaseRef,
    /// Its network.
    #[serde(default)]
    pub net: Net,
    /// Its limits.
    #[serde(default)]
    pub limits: Limits,
    /// Environment of every command, as `KEY=VALUE`; a command's own wins.
    #[serde(default)]
    pub env: Vec<String>,
    /// Layers are merged in the background when a stack has more than this many (2 to 480).
    #[serde(default = "default_merge_above")]
    pub merge_above: usize,
    /// What the templates of its checkpoints may take.
    #[serde(default)]
    pub pool: PoolBounds,
}

impl Default for SandboxSpec {
    fn default() -> Self {
        let (base, net, limits, env, pool) = Default::default();
        Self { base, net, limits, env, merge_above: default_merge_above(), pool }
    }
}

/// Chosen: after a switch nothing is cached, and the first look-up of a path then costs what the stack is deep: 11 us in a
/// stack of 20, 18 in one of 50, 36 in one of 100.
fn default_merge_above() -> usize {
    32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_hostname_label() {
        for good in ["a", "box-1", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<SandboxId>().map(String::from), Ok(good.to_owned()));
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "..", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?} was taken");
        }
    }
}
