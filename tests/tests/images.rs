//! `image import`: a base for good, from a directory or an archive.
#![expect(clippy::unwrap_used, reason = "a broken assumption of the story's own set-up ends it")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use deltabox_tests::{Host, skipped_without_root};

/// A root file system with a shell and three tools, from the host's own files.
fn small_root(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for sub in ["bin", "lib64", "lib/x86_64-linux-gnu", "data", "tmp"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    let script = "cp /bin/sh /bin/cat /bin/ls /bin/stat bin/ && \
        cp $(ldd bin/sh bin/cat bin/ls bin/stat | grep -o '/lib[^ ]*\\.so[^ ]*' | sort -u) lib/x86_64-linux-gnu/ && \
        cp /lib64/ld-linux-x86-64.so.2 lib64/";
    assert!(Command::new("sh").args(["-c", script]).current_dir(&root).status().unwrap().success());
    fs::write(root.join("data/file"), "content").unwrap();
    fs::hard_link(root.join("data/file"), root.join("data/link")).unwrap();
    std::os::unix::fs::chown(root.join("data/file"), Some(1000), Some(50)).unwrap();
    symlink("file", root.join("data/symlink")).unwrap();
    root
}

fn tar(root: &Path, to: &Path, flags: &[&str]) {
    let status = Command::new("tar").arg("-C").arg(root).args(flags).arg("-cf").arg(to).arg(".").status();
    assert!(status.unwrap().success());
}

#[test]
fn a_directory_and_an_archive_of_it_make_the_same_base() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    let root = small_root(&host.scratch());
    let archive = host.scratch().join("root.tar.gz");
    tar(&root, &archive, &["-z"]);
    for (name, source) in [("dir", &root), ("tar", &archive)] {
        host.cli(["image", "import", name, &source.to_string_lossy()]).ok();
        host.cli(["create", &format!("on-{name}"), "--base", name]).ok();
        let show = "stat -c '%u:%g %h %s' /data/file; cat /data/symlink; echo; echo new > /data/file; cat /data/file";
        assert_eq!(host.sh(&format!("on-{name}"), show).ok(), "1000:50 2 7\ncontent\nnew");
    }
    let listed = host.cli(["image", "ls", "--json"]).json();
    let names: Vec<_> = listed["images"].as_array().unwrap().iter().map(|image| image["name"].clone()).collect();
    assert_eq!(names, ["dir", "tar"]);
    // In use: refused. Not any more: gone, and the next sandbox cannot have it.
    assert_eq!(host.cli(["image", "rm", "--json", "dir"]).error()["code"], "refused");
    host.cli(["rm", "on-dir"]).ok();
    host.cli(["image", "rm", "dir"]).ok();
    assert_eq!(host.cli(["create", "again", "--json", "--base", "dir"]).error()["code"], "no_image");
    host.cli(["create", "other", "--base", "tar"]).ok();
    assert_eq!(host.sh("other", "cat /data/file").ok(), "content", "what a sandbox wrote is not in the image");
}

#[test]
fn a_damaged_or_malicious_archive_leaves_nothing() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    let root = small_root(&host.scratch());
    let whole = host.scratch().join("whole.tar");
    tar(&root, &whole, &[]);
    let bytes = fs::read(&whole).unwrap();
    let cut = host.scratch().join("cut.tar");
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let outside = host.scratch().join("outside");
    fs::create_dir(&outside).unwrap();
    let planted = host.scratch().join("planted.tar");
    // A link to the outside, then a file through it.
    let evil = host.scratch().join("evil");
    fs::create_dir(&evil).unwrap();
    symlink(&outside, evil.join("way")).unwrap();
    tar(&evil, &planted, &[]);
    fs::remove_file(evil.join("way")).unwrap();
    fs::create_dir(evil.join("way")).unwrap();
    fs::write(evil.join("way/out"), "gotcha").unwrap();
    let append = Command::new("tar").arg("-C").arg(&evil).arg("-rf").arg(&planted).arg("./way/out").status();
    assert!(append.unwrap().success());
    for source in [&cut, &planted] {
        let error = host.cli(["image", "import", "--json", "bad", &source.to_string_lossy()]).error();
        assert_eq!(error["code"], "refused", "{error}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.store().join("bases")).unwrap().count(), 0);
    assert_eq!(host.cli(["create", "--json", "--base", "bad"]).error()["code"], "no_image");
}
