//! Checkpoints on every file system that a store may lie on, and on one that is full.

use std::fs;

use deltabox_tests::disk::Disk;
use deltabox_tests::{Host, count, output, skipped_without_root};

/// Changes of every kind; the state after step `n` is told by `digest`.
fn change(host: &Host, n: usize) {
    let script = format!(
        "set -e; cd /srv; mkdir -p d{n}/e; head -c 40000 /dev/urandom > d{n}/e/f; ln d{n}/e/f d{n}/hard; ln -s e/f d{n}/soft
        echo {n} >> log; cp /etc/passwd p{n}; chmod 640 p{n}; mkfifo d{n}/ff; rm -f p$(({n} - 2)); mv d{n} moved{n}
        rm -rf moved$(({n} - 3)); test {n} = 0 || mv moved$(({n} - 1)) back$(({n} - 1)); rm -rf /etc/apt; echo x > /etc/motd"
    );
    host.sh("box", &script).ok();
}

fn digest(host: &Host) -> String {
    // The size of a directory is that of its topmost part.
    let script = "cd / && find srv etc/motd \\( -type d -printf '%p %y %m %U %G %T@\\n' \\) \
        -o -printf '%p %y %m %U %G %s %T@ %l\\n' | sort; \
        find srv -type f -print0 | sort -z | xargs -0 sha256sum";
    host.sh("box", script).ok()
}

fn goes_to_and_fro_on(kind: &str) {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make(kind);
    let host = Host::start_in(disk.dir(), &[]);
    host.cli(["create", "box", "--merge-above", "2"]).ok();
    let mut states = Vec::new();
    for n in 0..count(6, 40) {
        change(&host, n);
        let before = digest(&host);
        let id = if n % 3 == 0 {
            host.cli(["checkpoint", "box", "--fs-only", "--durable"]).ok()
        } else {
            host.checkpoint("box")
        };
        assert_eq!(digest(&host), before, "after {id}");
        states.push((id, before));
        // Somewhere in the middle, and on from there.
        let (to, expected) = &states[n / 2];
        host.cli(["rollback", "box", to, "--fs-only"]).ok();
        assert_eq!(&digest(&host), expected, "{to} after {n}");
        let (to, expected) = &states[n];
        host.cli(["rollback", "box", to, "--fs-only"]).ok();
        assert_eq!(&digest(&host), expected, "{to} after {n}");
    }
}

#[test]
fn a_store_on_ext4_goes_to_and_fro() {
    goes_to_and_fro_on("ext4");
}

#[test]
fn a_store_on_tmpfs_goes_to_and_fro() {
    goes_to_and_fro_on("tmpfs");
}

#[test]
fn a_store_on_xfs_with_reflink_goes_to_and_fro() {
    goes_to_and_fro_on("xfs");
}

#[test]
fn a_store_on_btrfs_goes_to_and_fro() {
    goes_to_and_fro_on("btrfs");
}

#[test]
fn a_full_disk_is_an_error_that_says_so_and_nothing_is_lost() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make_with("tmpfs", "size=64M");
    let host = Host::start_in(disk.dir(), &[]);
    host.create("box");
    host.sh("box", "echo first > /srv/n").ok();
    let first = host.checkpoint("box");
    host.sh("box", "echo second > /srv/n; cat /dev/zero > /srv/fill 2>/dev/null; true").ok();
    for command in [["checkpoint", "box", "--fs-only", "--json"], ["rollback", "box", &first, "--json"]] {
        let mut args = command.to_vec();
        if command[0] == "rollback" {
            args.push("--fs-only");
        }
        let error = host.cli(&args).error();
        assert!(error["message"].as_str().expect("a message").contains("No space left"), "{error}");
    }
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "second");
    assert_eq!(host.inspect("box")["head"], first.as_str());
    host.sh("box", "rm /srv/fill").ok();
    let second = host.checkpoint("box");
    host.cli(["rollback", "box", &first, "--fs-only"]).ok();
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "first");
    host.cli(["rollback", "box", &second, "--fs-only"]).ok();
    assert_eq!(host.sh("box", "cat /srv/n; ls /srv").ok(), "second\nn");
}

#[test]
fn a_store_that_takes_no_new_layers_is_an_error_that_says_where() {
    if skipped_without_root() {
        return;
    }
    let disk = Disk::make("ext4");
    let host = Host::start_in(disk.dir(), &[]);
    host.create("box");
    host.sh("box", "echo first > /srv/n").ok();
    let first = host.checkpoint("box");
    host.sh("box", "echo second > /srv/n").ok();
    let layers = host.store().join("layers");
    let chattr = |flag: &str| output(std::process::Command::new("chattr").arg(flag).arg(&layers)).ok();
    chattr("+i");
    let failed = host.cli(["checkpoint", "box", "--fs-only", "--json"]);
    let rolled = host.cli(["rollback", "box", &first, "--fs-only", "--json"]);
    chattr("-i");
    for error in [failed.error(), rolled.error()] {
        assert_eq!(error["code"], "io", "{error}");
    }
    assert_eq!(host.sh("box", "cat /srv/n").ok(), "second");
    host.checkpoint("box");
    assert_eq!(fs::read_dir(layers).expect("list layers").count(), 3);
}
