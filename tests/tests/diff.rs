//! What changed in a sandbox, as a user sees it.

use std::io::Write;
use std::process::{Command, Stdio};

use deltabox_tests::{Host, skipped_without_root};
use serde_json::{Value, json};

fn checkpoint(host: &Host, name: &str) -> String {
    host.cli(["checkpoint", "box", "--fs-only", "--name", name]).ok()
}

fn diff(host: &Host, args: &[&str]) -> Vec<String> {
    let words = ["diff", "box"].iter().chain(args);
    host.cli(words).ok().lines().map(str::to_owned).collect()
}

#[test]
fn a_diff_tells_what_was_done_since_the_last_checkpoint_and_between_any_two() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    assert_eq!(diff(&host, &[]), [] as [&str; 0]);
    host.sh("box", "cd /srv; mkdir -p d/sub; echo one > d/sub/f; echo two > g; ln -s g l; chmod 600 g").ok();
    let added = ["A /srv/d/", "A /srv/d/sub/", "A /srv/d/sub/f (4 bytes)", "A /srv/g (4 bytes)"];
    assert_eq!(diff(&host, &[]), [&added[..], &["A /srv/l (symbolic link)"]].concat());
    checkpoint(&host, "first");
    assert_eq!(diff(&host, &[]), [] as [&str; 0]);
    host.sh("box", "cd /srv; mv d e; echo changed >> e/sub/f; rm l; ln -s e l; chmod 644 g; touch g; echo x > new")
        .ok();
    let second = [
        "R /srv/d/ -> /srv/e/",
        "M /srv/e/sub/f (4 -> 12 bytes)",
        "M /srv/g (mode 0600 -> 0644)",
        "M /srv/l (target g -> e)",
        "A /srv/new (2 bytes)",
    ];
    assert_eq!(diff(&host, &[]), second);
    assert_eq!(diff(&host, &["first"]), second);
    checkpoint(&host, "second");
    host.sh("box", "cd /srv; rm -r e; mv new moved; rm g; mkdir g; chown 5:6 .").ok();
    checkpoint(&host, "third");
    assert_eq!(diff(&host, &["first", "second"]), second);
    let third = [
        "M /srv/ (owner 0:0 -> 5:6)",
        "D /srv/e/",
        "T /srv/g/ (file -> directory, mode 0644 -> 0755)",
        "R /srv/new -> /srv/moved",
    ];
    let told = diff(&host, &["second", "third"]);
    assert_eq!(told, [third[0], third[1], "T /srv/g/ (file -> directory)", third[3]]);
    // And back: what was there again is there again.
    let back = diff(&host, &["third", "second", "--contents"]);
    let expected = [
        "M /srv/ (owner 5:6 -> 0:0)",
        "A /srv/e/",
        "A /srv/e/sub/",
        "A /srv/e/sub/f (12 bytes)",
        "T /srv/g (directory -> file)",
        "R /srv/moved -> /srv/new",
    ];
    assert_eq!(back, expected);
    // A rollback makes the target the state that it is compared with; another branch can be compared, too.
    host.cli(["rollback", "box", "first", "--fs-only"]).ok();
    assert_eq!(diff(&host, &[]), [] as [&str; 0]);
    host.sh("box", "echo branch > /srv/branch").ok();
    assert_eq!(diff(&host, &[]), ["A /srv/branch (7 bytes)"]);
    assert!(diff(&host, &["third"]).contains(&"A /srv/d/".to_owned()));
}

#[test]
fn files_of_the_base_are_compared_through_their_copies() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let size = host.sh("box", "stat -c %s /etc/passwd").ok();
    host.sh("box", "touch /etc/group; chmod 600 /etc/passwd; echo x >> /etc/passwd").ok();
    host.sh("box", "mv /usr/share /usr/shared; mv /etc/profile /etc/moved; rm -r /usr/bin; mkdir /usr/bin").code();
    let told = diff(&host, &[]);
    let expected = format!("M /etc/passwd ({size} -> {} bytes, mode 0644 -> 0600)", size.parse::<u64>().unwrap() + 2);
    assert!(told.contains(&expected), "{told:?}");
    assert!(told.contains(&"R /usr/share/ -> /usr/shared/".to_owned()), "{told:?}");
    assert!(told.contains(&"R /etc/profile -> /etc/moved".to_owned()), "{told:?}");
    assert!(!told.iter().any(|line| line.contains("/etc/group")), "{told:?}");
}

#[test]
fn a_patch_applied_to_the_old_state_gives_the_new_one() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let write = "import random, sys; random.seed(int(sys.argv[1])); \
                 open('/srv/text', 'w').writelines(f'{i}\\n' for i in range(500) if random.random() < 0.9); \
                 open('/srv/gone' if sys.argv[1] == '1' else '/srv/new', 'w').write('a\\nb' + sys.argv[1])";
    host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", write, "1"]).ok();
    checkpoint(&host, "old");
    host.cli(["exec", "box", "--", "/usr/bin/python3", "-c", write, "2"]).ok();
    host.sh("box", "rm /srv/gone; printf 'x\\0y' > /srv/binary").ok();
    checkpoint(&host, "new");
    let patch = host.cli(["diff", "box", "old", "new", "-p"]).ok() + "\n";
    assert!(patch.contains("Binary files /dev/null and b/srv/binary differ"), "{patch}");
    let read = "cd /srv; rm -f binary; for f in *; do echo $f; cat $f; done";
    let expected = host.sh("box", read).ok();
    host.cli(["rollback", "box", "old", "--fs-only"]).ok();
    let scratch = host.scratch();
    for name in ["text", "gone"] {
        let content = host.sh("box", &format!("cat /srv/{name}; echo .")).ok();
        std::fs::create_dir_all(scratch.join("srv")).expect("a directory");
        std::fs::write(scratch.join("srv").join(name), content.strip_suffix('.').expect("its end")).expect("written");
    }
    let mut patching = Command::new("patch")
        .args(["-p1", "--quiet"])
        .current_dir(&scratch)
        .stdin(Stdio::piped())
        .spawn()
        .expect("start patch");
    patching.stdin.take().expect("its input").write_all(patch.as_bytes()).expect("give it the patch");
    assert!(patching.wait().expect("wait for patch").success(), "{patch}");
    let read = "for f in *; do echo $f; cat $f; done";
    let got = Command::new("sh").args(["-c", read]).current_dir(scratch.join("srv")).output().expect("read");
    assert_eq!(String::from_utf8_lossy(&got.stdout).trim_end(), expected);
}

#[test]
fn json_has_every_detail_and_errors_are_told() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    host.sh("box", "printf 'a\\n' > /srv/f").ok();
    let report = host.cli(["diff", "box", "--json", "-p"]).json();
    let change = json!({
        "path": "/srv/f", "change": "added", "kind": "file", "new_size_bytes": 2,
        "patch": "--- /dev/null\n+++ b/srv/f\n@@ -0,0 +1 @@\n+a\n",
    });
    assert_eq!(report, json!({"sandbox": "box", "from": null, "to": null, "changes": [change]}));
    let id = checkpoint(&host, "one");
    let report = host.cli(["diff", "box", "one", "one", "--json"]).json();
    assert_eq!(report, json!({"sandbox": "box", "from": id, "to": id, "changes": []}));
    assert_eq!(host.cli(["diff", "box", "two", "--json"]).error()["code"], "no_checkpoint");
    assert_eq!(host.cli(["diff", "nobody", "--json"]).error()["code"], "no_sandbox");
    // A dead sandbox still has its files.
    host.sh("box", "echo more > /srv/g").ok();
    host.cli(["kill", "box"]).ok();
    let report = host.cli(["diff", "box", "--json"]).json();
    assert_eq!(report["changes"][0]["path"], Value::from("/srv/g"));
}

#[test]
fn a_diff_of_a_busy_sandbox_that_is_rolled_back_is_answered_or_refused() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    host.sh("box", "mkdir /srv/d; echo x > /srv/d/f").ok();
    checkpoint(&host, "start");
    let busy =
        "cd /srv; while :; do mkdir -p a/b; echo y > a/b/f; mv a/b a/c; mv d e; mv e d; rm a/c/f; rmdir a/c a; done";
    host.cli(["exec", "-d", "box", "--", "/bin/sh", "-c", busy]).ok();
    std::thread::scope(|scope| {
        let rolling = scope.spawn(|| {
            for _ in 0..20 {
                host.cli(["rollback", "box", "start", "--fs-only"]).ok();
            }
        });
        while !rolling.is_finished() {
            let output = host.cli(["diff", "box", "-p", "--contents", "--json"]);
            assert!(output.code() == 0 || output.code() == 3, "{output:?}");
            if output.code() == 0 {
                let report = output.json();
                let paths: Vec<_> = report["changes"].as_array().expect("changes").iter().collect();
                for change in paths {
                    let path = change["path"].as_str().expect("a path");
                    assert!(path.starts_with("/srv"), "{change}");
                }
            }
        }
    });
}
