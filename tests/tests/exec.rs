//! Commands in a running sandbox: streams, exit status, users, detached ones, terminals.

use std::io::{Read, Write};
use std::process::Stdio;

use deltabox_tests::{Host, count, n_descriptors, resident_bytes, skipped_without_root};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn streams_stay_apart_and_the_status_is_the_commands() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let seen = host.sh("a", "echo out; echo err >&2; exit 7");
    assert_eq!((seen.code(), seen.stdout.as_str(), seen.stderr.as_str()), (7, "out\n", "err\n"));
    assert_eq!(host.sh("a", "kill -TERM $$").code(), 128 + 15);
    let echoed = host.cli_with_input(["exec", "-i", "a", "--", "cat"], b"over and back");
    assert_eq!((echoed.code(), echoed.stdout.as_str()), (0, "over and back"));
    assert_eq!(host.cli_with_input(["exec", "a", "--", "cat"], b"ignored").ok(), "");
}

#[test]
fn directory_user_group_and_environment_are_as_asked() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "a", "--env", "A=1", "--env", "B=1"]).ok();
    let show = "pwd; id -u; id -g; id -G; echo $A $B $HOME";
    let seen = host.cli(["exec", "-w", "/usr/bin", "-u", "1000:50", "--env", "B=2", "a", "--", "sh", "-c", show]).ok();
    assert_eq!(seen, "/usr/bin\n1000\n50\n50\n1 2 /");
    assert_eq!(host.sh("a", show).ok(), "/\n0\n0\n0\n1 1 /root");
    let user =
        host.cli(["exec", "-u", "1000", "a", "--", "sh", "-c", "grep CapEff /proc/self/status; cat /proc/1/environ"]);
    assert!(user.stdout.contains("0000000000000000"), "{user:?}");
}

#[test]
fn what_cannot_start_says_which_step_failed_and_leaves_the_sandbox_as_it_was() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    for (args, step) in [
        (vec!["exec", "--json", "a", "--", "no-such-program"], "execve"),
        (vec!["exec", "--json", "a", "--", "/etc/passwd"], "execve"),
        (vec!["exec", "--json", "-w", "/nowhere", "a", "--", "true"], "chdir"),
        (vec!["exec", "--json", "-u", "70000", "a", "--", "true"], "user"),
    ] {
        let error = host.cli(&args).error();
        assert!(error["message"].as_str().unwrap().contains(step), "{args:?}: {error}");
        assert!(!error["hint"].as_str().unwrap().is_empty());
    }
    assert_eq!(host.cli(["exec", "-u", "70000", "a", "--", "true"]).code(), 2, "a usage error");
    let ps = host.cli(["ps", "--json", "a"]).json();
    assert_eq!(ps["processes"].as_array().unwrap().len(), 1, "only init: {ps}");
    assert_eq!(host.cli(["exec", "--json", "nobody", "--", "true"]).error()["code"], "no_sandbox");
}

#[test]
fn a_detached_command_logs_and_its_log_is_followed_to_its_end() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let script = "echo one; echo two >&2; while ! test -e /tmp/go; do read -t 0.02 x < /dev/zero; done; echo three";
    let pid = host.cli(["exec", "-d", "a", "--", "bash", "-c", script]).ok();
    assert!(pid.parse::<u32>().unwrap() > 1);
    let mut follow = host.command(["logs", "a", &pid, "-f"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut start = [0; 8];
    follow.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
    assert_eq!(&start, b"one\ntwo\n");
    host.sh("a", "touch /tmp/go").ok();
    let mut rest = String::new();
    follow.stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    assert!(follow.wait().unwrap().success());
    assert_eq!(rest, "three\n");
    assert_eq!(host.cli(["logs", "a"]).ok(), "one\ntwo\nthree");
}

#[test]
fn what_a_background_process_prints_after_its_command_has_ended_goes_to_the_log() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let script = "(while ! test -e /tmp/go; do read -t 0.02 x < /dev/zero; done; echo late) & echo early";
    let seen = host.cli(["exec", "a", "--", "bash", "-c", script]);
    assert_eq!(seen.ok(), "early");
    host.sh("a", "touch /tmp/go").ok();
    assert_eq!(host.cli(["logs", "a", "-f"]).ok(), "late");
}

#[test]
fn a_client_that_disappears_ends_or_leaves_its_command_as_asked() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    for (mode, survives) in [("end", false), ("leave", true)] {
        let script = format!(
            "echo up; trap 'exit 0' HUP; while true; do read -t 0.02 x < /dev/zero; test -e /tmp/stop-{mode} && echo done && exit; done"
        );
        let mut client = host
            .command(["exec", "--on-disconnect", mode, "a", "--", "bash", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        client.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        client.kill().unwrap();
        client.wait().unwrap();
        if survives {
            host.sh("a", &format!("touch /tmp/stop-{mode}")).ok();
            assert!(host.cli(["logs", "a", "-f"]).ok().ends_with("done"));
        } else {
            wait_for(|| host.cli(["ps", "--json", "a"]).json()["processes"].as_array().unwrap().len() == 1);
        }
    }
}

/// Looks again and again; fails after a while.
fn wait_for(mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !done() {
        assert!(std::time::Instant::now() < end, "it did not happen within 30 s");
    }
}

#[test]
fn signals_to_the_client_reach_the_command() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let script = "trap 'echo got; exit 3' TERM; echo up; while true; do read -t 0.02 x < /dev/zero; done";
    let mut client = host
        .command(["exec", "a", "--", "bash", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    kill(Pid::from_raw(client.id().cast_signed()), Signal::SIGTERM).unwrap();
    let mut rest = String::new();
    client.stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!((client.wait().unwrap().code(), rest.as_str()), (Some(3), "got\n"));
}

#[test]
fn a_gigabyte_of_output_passes_in_constant_memory() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    host.sh("a", "true").ok();
    let before = resident_bytes(host.daemon_pid());
    let len = u64::try_from(count(64 << 20, 1 << 30)).unwrap();
    let script = format!("head -c {len} /dev/zero");
    let mut client = host
        .command(["exec", "a", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut total, mut buf, mut most) = (0_u64, vec![0_u8; 1 << 16], 0);
    let client_pid = Pid::from_raw(client.id().cast_signed());
    loop {
        let n = client.stdout.as_mut().unwrap().read(&mut buf).unwrap();
        if n == 0 {
            break;
        }
        if total / (16 << 20) != (total + n as u64) / (16 << 20) {
            most = most.max(resident_bytes(host.daemon_pid()).saturating_sub(before) + resident_bytes(client_pid));
        }
        total += n as u64;
    }
    assert!(client.wait().unwrap().success());
    assert_eq!(total, len);
    assert!(most < 32 << 20, "daemon and client grew to {most} bytes");
}

#[test]
fn many_short_commands_leak_nothing() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let init = Pid::from_raw(i32::try_from(host.inspect("a")["init_pid"].as_i64().unwrap()).unwrap());
    let run = |n: usize| {
        for i in 0..n {
            let flags: &[&str] = match i % 3 {
                0 => &["exec", "a", "--", "true"],
                1 => &["exec", "-i", "a", "--", "cat"],
                _ => &["exec", "-d", "a", "--", "true"],
            };
            assert!(host.cli(flags).status.success());
        }
    };
    run(20);
    let settled = || (n_descriptors(host.daemon_pid()), n_descriptors(init));
    let before = settled();
    let memory = resident_bytes(host.daemon_pid());
    run(count(150, 10_000));
    wait_for(|| host.cli(["ps", "--json", "a"]).json()["processes"].as_array().unwrap().len() == 1);
    wait_for(|| settled() <= before);
    let grown = resident_bytes(host.daemon_pid()).saturating_sub(memory);
    assert!(grown < 8 << 20, "the daemon grew by {grown} bytes");
    assert!(resident_bytes(init) < 1 << 20, "init has {} bytes", resident_bytes(init));
}

#[test]
fn input_larger_than_every_buffer_arrives_whole() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let input: Vec<u8> = (0..5_000_000_u32).map(|i| b'a' + u8::try_from(i % 23).unwrap()).collect();
    let mut child = host
        .command(["exec", "-i", "a", "--", "sh", "-c", "wc -c; cat /dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text.trim(), "5000000");
}
