//! Terminals: sessions with a client outside, and pairs inside.

use deltabox_tests::terminal::Terminal;
use deltabox_tests::worker::Worker;
use deltabox_tests::{Host, skipped_without_root};
use serde_json::json;

use crate::{checkpoint, roll_back};

#[test]
fn what_was_typed_after_the_checkpoint_is_gone_and_the_shell_goes_on() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut terminal = Terminal::run(&mut host.command(["exec", "-t", "box", "--", "bash", "--norc"]));
    terminal.until("# ");
    terminal.type_in("a=first; cd /srv; echo $a-$?\r");
    terminal.until("first-0");
    terminal.until("# ");
    let id = checkpoint(&host);
    for _ in 0..3 {
        terminal.type_in("a=later; cd /; stty -echo; sleep 1000 &\r");
        terminal.until("# ");
        // Half a line, which nobody has ended.
        terminal.type_in("touch /srv/unwanted");
        roll_back(&host, &id);
        terminal.type_in("\r");
        terminal.type_in("echo $a in $PWD with $(jobs | wc -l) jobs\r");
        terminal.until("first in /srv with 0 jobs");
        terminal.until("# ");
        assert!(!host.inside("box", "/srv/unwanted").exists());
        // Interrupts, job control.
        terminal.type_in("sh -c 'echo it runs; exec sleep 1000'\r");
        terminal.until("\rit runs");
        terminal.type_in("\x03");
        terminal.until("# ");
        terminal.type_in("echo status $?\r");
        terminal.until("status 130");
        terminal.until("# ");
    }
    terminal.type_in("exit 7\r");
    assert_eq!(terminal.wait().code(), Some(7));
}

#[test]
fn a_job_in_the_foreground_is_there_again() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut terminal = Terminal::run(&mut host.command(["exec", "-t", "box", "--", "bash", "--norc"]));
    terminal.until("# ");
    // Keys are typed when the program is there to get them, not while the shell still reads its line.
    terminal.type_in("sh -c 'echo it runs; exec cat'\r");
    terminal.until("\rit runs");
    terminal.type_in("one\r");
    terminal.until("one");
    terminal.until("one");
    let id = checkpoint(&host);
    for _ in 0..2 {
        terminal.type_in("two\r");
        terminal.until("two");
        terminal.until("two");
        roll_back(&host, &id);
        terminal.type_in("three\r");
        terminal.until("three");
        terminal.until("three");
    }
    terminal.type_in("\x04");
    terminal.until("# ");
    terminal.type_in("exit\r");
    assert_eq!(terminal.wait().code(), Some(0));
}

#[test]
fn a_pair_inside_goes_back_with_its_modes_and_what_waits_in_it() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    worker.ask(
        "import pty, select, termios, tty, fcntl, struct
m, s = pty.openpty(); fcntl.ioctl(m, termios.TIOCSWINSZ, struct.pack('4H', 40, 100, 0, 0))
os.write(m, b'typed\\n'); select.select([m], [], []); os.write(s, b'shown')
def look():
    modes = termios.tcgetattr(s)
    size = struct.unpack('4H', fcntl.ioctl(s, termios.TIOCGWINSZ, bytes(8)))[:2]
    return [bool(modes[3] & termios.ECHO), list(size), os.read(s, 100).decode(), os.read(m, 100).decode(), os.ttyname(s)]",
    );
    let id = checkpoint(&host);
    let name = worker.ask("os.ttyname(s)");
    let expected = json!([true, [40, 100], "typed\n", "typed\r\nshown", name]);
    for change in [
        "pass",
        "tty.setraw(s); fcntl.ioctl(m, termios.TIOCSWINSZ, struct.pack('4H', 1, 2, 0, 0)); os.write(m, b'unwanted')",
        "os.close(m); os.close(s)",
        "os.close(m); os.close(s); m, s = pty.openpty(); other = pty.openpty(); os.write(other[0], b'unwanted')",
    ] {
        worker.ask(change);
        for _ in 0..2 {
            roll_back(&host, &id);
            assert_eq!(worker.ask("look()"), expected, "after {change}");
        }
        roll_back(&host, &id);
    }
    assert!(worker.end().success());
}

#[test]
fn a_shell_that_has_ended_is_made_again_on_a_terminal_that_nobody_sees() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("box");
    let mut worker = Worker::start(&host, "box");
    let shell = "PROMPT_COMMAND='tty > /srv/tty; ps -o tpgid= -p $$ > /srv/front'; a=first";
    let mut terminal = Terminal::run(&mut host.command(["exec", "-t", "box", "--", "bash", "--norc"]));
    terminal.until("# ");
    terminal.type_in(&format!("{shell}\r"));
    terminal.until("# ");
    let id = checkpoint(&host);
    terminal.type_in("exit\r");
    assert_eq!(terminal.wait().code(), Some(0));
    worker.ask("[os.unlink(f) for f in ('/srv/tty', '/srv/front') if os.path.exists(f)]");
    let report = roll_back(&host, &id);
    let how: Vec<_> = report["processes"].as_array().expect("processes").iter().map(|one| one["how"].clone()).collect();
    assert_eq!(how, [json!("in place"), json!("fork")], "{report}");
    // It has a terminal, and is in front there.
    let look = "import subprocess
pid = [p for p in os.listdir('/proc') if p.isdigit() and os.path.exists(f'/proc/{p}/comm') and open(f'/proc/{p}/comm').read() == 'bash\\n'][0]
stat = open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()
[os.readlink(f'/proc/{pid}/fd/0'), stat[4] != '0', stat[5] == pid]";
    assert_eq!(worker.ask(look), json!(["/dev/pts/0", true, true]));
    worker.ask("os.kill(int(pid), 1)");
    assert!(worker.end().success());
}
