//! TEMPORARY: replaced at merge.
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// hierarchies
#[derive(Debug, Clone)]
pub struct Hierarchies {
    /// unified
    pub unified: PathBuf,
    /// v1
    pub v1: BTreeMap<String, PathBuf>,
    /// v2
    pub v2_controllers: BTreeSet<String>,
}
impl Hierarchies {
    /// find
    pub fn find() -> std::io::Result<Self> {
        let mut unified = None;
        let mut v1 = BTreeMap::new();
        for line in std::fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let f: Vec<&str> = line.split(' ').collect();
            let dash = f.iter().position(|x| *x == "-").unwrap_or(0);
            match f[dash + 1] {
                "cgroup2" => unified = Some(PathBuf::from(f[4])),
                "cgroup" => {
                    for c in f[dash + 3].split(',') {
                        v1.insert(c.to_owned(), PathBuf::from(f[4]));
                    }
                }
                _ => {}
            }
        }
        let unified = unified.ok_or(std::io::Error::from(std::io::ErrorKind::NotFound))?;
        let text = std::fs::read_to_string(unified.join("cgroup.controllers"))?;
        Ok(Self { unified, v1, v2_controllers: text.split_whitespace().map(str::to_owned).collect() })
    }
}
