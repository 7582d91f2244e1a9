//! `exec -t`: a shell in a terminal, as a person uses it.

use deltabox_tests::terminal::Terminal;
use deltabox_tests::{Host, skipped_without_root};
use nix::sys::signal::Signal;

/// A prompt that the typed line itself does not contain.
const SHELL: [&str; 9] = ["exec", "-t", "-i", "--env", "PS1=ready$((1+1))> ", "a", "--", "bash", "--norc"];
const PROMPT: &str = "ready2> ";

#[test]
fn a_shell_has_a_terminal_with_size_interrupt_and_job_control() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let mut shell = Terminal::run(&mut host.command(SHELL));
    shell.until(PROMPT);
    shell.type_in("tty; stty size\r");
    let seen = shell.until(PROMPT);
    assert!(seen.contains("/dev/pts/0") && seen.contains("24 80"), "{seen}");
    shell.type_in("trap 'echo changed to $(stty size)' WINCH\r");
    shell.until(PROMPT);
    shell.resize(30, 100);
    shell.type_in("\r");
    shell.until("changed to 30 100");
    // The trap ran before the prompt or after it: size and keys are not in order.
    shell.type_in("echo now $((2+3))\r");
    shell.until("now 5");
    shell.until(PROMPT);
    // Keys are typed when the program is there to get them, not while the shell still reads its line.
    shell.type_in("sh -c 'echo it runs; exec sleep 1000'\r");
    shell.until("\rit runs");
    shell.type_in("\x03");
    shell.until(PROMPT);
    shell.type_in("echo after $?\r");
    shell.until("after 130");
    shell.until(PROMPT);
    // The same for `fg`: the shell prints the job's line before the job has the terminal.
    // (Not a shell: one that is just starting a child by vfork when ^Z comes would not stop, on any Linux.)
    shell.type_in(
        "python3 -c 'import os, signal as s; s.signal(s.SIGCONT, lambda *a: os.write(1, b\"it goes on\\n\")); \
         os.write(1, b\"it runs\\n\"); [s.pause() for _ in iter(int, 1)]'\r",
    );
    shell.until("\rit runs");
    shell.type_in("\x1a");
    shell.until("Stopped");
    shell.until(PROMPT);
    shell.type_in("fg\r");
    shell.until("\nit goes on");
    shell.type_in("\x03");
    shell.until(PROMPT);
    shell.type_in("jobs; echo none left\r");
    shell.until("\rnone left");
    shell.until(PROMPT);
    shell.type_in("exit 4\r");
    assert_eq!(shell.wait().code(), Some(4));
}

#[test]
fn a_terminal_session_works_again_after_the_daemon_was_killed() {
    if skipped_without_root() {
        return;
    }
    let mut host = Host::start();
    host.create("a");
    let mut shell = Terminal::run(&mut host.command(SHELL));
    shell.until(PROMPT);
    shell.type_in("x=remembered\r");
    shell.until(PROMPT);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        host.end_daemon(signal);
        host.start_daemon();
        // A key typed while no daemon was there may be lost, so the line is typed until it is answered.
        host.sh("a", "true").ok();
        shell.type_in("echo still $x\r");
        shell.until("still remembered");
        shell.until(PROMPT);
    }
    shell.type_in("exit\r");
    assert_eq!(shell.wait().code(), Some(0));
}

#[test]
fn a_detached_terminal_is_attached_again_with_its_shell() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let mut args = SHELL.to_vec();
    args.splice(3..3, ["--on-disconnect", "leave"]);
    let mut shell = Terminal::run(&mut host.command(args));
    shell.until(PROMPT);
    shell.type_in("x=remembered; echo pid $$\r");
    shell.until("pid ");
    shell.until("pid ");
    let pid = shell.until("\r\n");
    nix::sys::signal::kill(shell.pid(), Signal::SIGKILL).unwrap();
    shell.wait();
    let mut shell = Terminal::run(&mut host.command(["attach", "a", &pid]));
    shell.type_in("echo still $x\r");
    shell.until("still remembered");
    shell.until(PROMPT);
    shell.type_in("exit 6\r");
    assert_eq!(shell.wait().code(), Some(6));
}
