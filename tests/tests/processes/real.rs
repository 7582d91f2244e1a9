//! Real programs that never rest, checkpointed and rolled back at random moments: they notice by themselves if they are not
//! where their files are.

use std::process::Child;
use std::process::Stdio;

use deltabox_tests::{Host, count, skipped_without_root, wait_within};

use crate::checkpoint;

/// Runs `words` through rounds; each may be refused while a child that will be gone is there.
fn runs(words: &[&str], file: &str, may_be_refused: bool) {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut command = host.command(["exec", "box", "--"].iter().chain(words));
    let mut child: Child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("start deltabox");
    let path = host.inside("box", file);
    wait_within(60, "the program works", || std::fs::metadata(&path).is_ok_and(|file| file.len() > 0));
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    let (mut checkpoints, mut n_back, mut n_refused) = (vec![checkpoint(&host)], 0, 0);
    for round in 0..count(50, 1000) {
        if next(2) == 0 {
            checkpoints.push(checkpoint(&host));
            if checkpoints.len() > 6 {
                let gone = checkpoints.remove(usize::try_from(next(6)).expect("a small number"));
                host.cli(["rm", &format!("box@{gone}")]).ok();
            }
        }
        let to = &checkpoints[usize::try_from(next(checkpoints.len() as u64)).expect("a small number")];
        let back = host.cli(["rollback", "box", to]);
        match back.code() {
            0 => n_back += 1,
            3 if may_be_refused => n_refused += 1,
            _ => {
                std::thread::sleep(std::time::Duration::from_millis(1500));
                let ended = child.try_wait().expect("look at the program").map(|_| last_words(&mut child));
                assert!(back.status.success(), "round {round}: {back:?}; the program: {ended:?}");
            }
        }
        let status = child.try_wait().expect("look at the program");
        assert!(status.is_none(), "round {round}: {status:?}: {}", last_words(&mut child));
    }
    assert!(n_back > 0, "{n_refused} were refused");
    // It is still there, and goes on.
    let before = std::fs::read(&path).expect("its file");
    wait_within(60, "the program goes on", || std::fs::read(&path).is_ok_and(|now| now != before));
    host.cli(["rm", "box"]).ok();
    child.wait().expect("wait for deltabox");
}

/// What the program says of itself, once it has ended by itself.
fn last_words(child: &mut Child) -> String {
    let mut told = String::new();
    let output = child.stdout.as_mut().expect("an output");
    std::io::Read::read_to_string(output, &mut told).expect("what it says");
    told
}

#[test]
fn a_threaded_program_goes_through_rounds_at_random_moments() {
    runs(&["/usr/bin/python3", "-c", include_str!("programs/chains.py")], "/srv/chain0", false);
}

#[test]
fn a_shell_whose_children_come_and_go_goes_through_rounds() {
    // Children of the moment of a checkpoint have ended when it is come back to.
    runs(&["/bin/bash", "-c", include_str!("programs/chains.sh")], "/srv/chain0", true);
}

#[test]
fn a_database_goes_through_rounds_with_its_writer() {
    // With a rollback journal it takes a file whose inode number has changed for another one (docs/checkpoints.md).
    runs(&["/usr/bin/python3", "-c", include_str!("programs/database.py"), "wal"], "/srv/chain0.new", false);
}
