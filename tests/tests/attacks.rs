//! Attacks from inside: each tries to get out, and the story holds that it does not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use deltabox_tests::{Host, skipped_without_root};
use nix::sys::signal::Signal;

/// System calls made by number through Python's ctypes: prints `name errno` (0 for success) a line.
const CALLS: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    print(name, ctypes.get_errno() if result < 0 else 0, flush=True)
b = ctypes.c_char_p
"#;

fn errnos(host: &Host, sandbox: &str, calls: &str) -> Vec<(String, i32)> {
    let script = format!("{CALLS}{calls}");
    let text = host.cli(["exec", sandbox, "--", "python3", "-c", &script]).ok();
    let pair = |line: &str| {
        let (name, errno) = line.split_once(' ').expect("name and errno");
        (name.to_owned(), errno.parse().expect("a number"))
    };
    text.lines().map(pair).collect()
}

#[test]
fn mounts_namespaces_and_kernel_machinery_are_refused_to_root_inside() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let seen = errnos(
        &host,
        "a",
        r#"
call("mount", 165, b(b"none"), b(b"/mnt"), b(b"tmpfs"), 0, 0)
call("bind", 165, b(b"/usr"), b(b"/mnt"), 0, 4096, 0)
call("remount", 165, 0, b(b"/proc/sys"), 0, 32 | 4096, 0)
call("umount", 166, b(b"/proc/sys"), 2)
call("pivot_root", 155, b(b"/"), b(b"/mnt"))
call("chroot", 161, b(b"/tmp"))
call("fsopen", 430, b(b"tmpfs"), 0)
call("open_tree", 428, -100, b(b"/"), 1)
call("move_mount", 429, 3, b(b""), -100, b(b"/mnt"), 4)
call("mount_setattr", 442, -100, b(b"/proc/sys"), 0, 0, 0)
fd = open("/proc/self/ns/mnt")
call("setns", 308, fd.fileno(), 0)
for name, flag in [("user", 0x10000000), ("mnt", 0x20000), ("pid", 0x20000000), ("net", 0x40000000), ("ipc", 0x8000000), ("uts", 0x4000000), ("cgroup", 0x2000000), ("time", 0x80)]:
    call("unshare-" + name, 272, flag)
call("clone-user", 56, 0x10000000 | 17, 0, 0, 0, 0)
call("clone-pid", 56, 0x20000000 | 17, 0, 0, 0, 0)
call("clone3", 435, 0, 0)
call("bpf", 321, 0, 0, 0)
call("perf_event_open", 298, 0, 0, -1, -1, 0)
call("userfaultfd", 323, 0)
call("io_uring_setup", 425, 8, 0)
call("open_by_handle_at", 304, 3, 0, 0)
call("keyctl", 250, 0, -3, 0)
call("add_key", 248, b(b"user"), b(b"x"), b(b"y"), 1, -3)
call("init_module", 175, 0, 0, b(b""))
call("kexec_load", 246, 0, 0, 0, 0)
call("reboot", 169, 0xfee1dead, 672274793, 0x1234567, 0)
call("syslog", 103, 3, 0, 0)
call("swapon", 167, b(b"/tmp/x"), 0)
call("fanotify_init", 300, 0, 0)
call("x32-getpid", 0x40000000 + 39)
call("vsock", 41, 40, 1, 0)
call("packet", 41, 17, 3, 0)
call("alg", 41, 38, 5, 0)
call("raw", 41, 2, 3, 255)
call("mknod", 133, b(b"/tmp/sda"), 0o60600, 0x800)
call("sethostname-ok", 170, b(b"x"), 1)
"#,
    );
    let expect = |name: &str| match name {
        "clone3" | "io_uring_setup" | "x32-getpid" => 38,
        "vsock" | "packet" | "alg" => 97,
        "sethostname-ok" => 0,
        _ => 1,
    };
    assert!(seen.len() > 40, "the script ended early: {seen:?}");
    for (name, errno) in seen {
        assert_eq!(errno, expect(&name), "{name}");
    }
}

#[test]
fn a_new_user_namespace_is_refused_by_the_limit_too() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    assert_eq!(host.sh("a", "cat /proc/sys/user/max_user_namespaces /proc/sys/user/max_mnt_namespaces").ok(), "0\n0");
    assert_ne!(host.sh("a", "echo 9 > /proc/sys/user/max_user_namespaces").code(), 0);
    assert_ne!(host.cli(["exec", "-u", "1000", "a", "--", "unshare", "-Ur", "true"]).code(), 0);
}

#[test]
fn kernel_memory_sysrq_and_sysctls_are_out_of_reach() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    for script in [
        "head -c 1 /proc/kcore | grep -q .",
        "head -c 1 /proc/kallsyms | grep -q .",
        "head -c 1 /proc/keys | grep -q .",
        "echo h > /proc/sysrq-trigger && grep -q . /proc/sysrq-trigger",
        "echo 1 > /proc/sys/kernel/panic",
        "echo /tmp/x > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/vm/drop_caches",
        "echo 1 > /proc/irq/default_smp_affinity",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "ls /sys/firmware/* /sys/kernel/debug/* >/dev/null 2>&1",
        "cat /dev/mem /dev/kmsg /dev/vda /dev/sda",
        "ls /sys/fs/cgroup/cgroup.procs",
    ] {
        assert_ne!(host.sh("a", script).code(), 0, "{script}");
    }
    // And what needs no protection is there.
    host.sh("a", "test -r /proc/cpuinfo && test -r /proc/meminfo && test -c /dev/null && echo x > /dev/null").ok();
}

#[test]
fn what_the_host_base_does_not_list_does_not_exist() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    let secret = host.scratch().join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    host.create("a");
    let secret = secret.to_string_lossy().into_owned();
    assert_ne!(host.cli(["exec", "a", "--", "cat", &secret]).code(), 0);
    assert_ne!(host.sh("a", "cat /etc/shadow /etc/gshadow").code(), 0);
    assert_eq!(host.sh("a", "find /etc -type f ! -perm -004").ok(), "", "something private was copied from /etc");
    assert_eq!(host.sh("a", "ls -A /root /home /tmp /mnt /srv /var/lib | grep -v : | grep .").code(), 1);
    let root = host.sh("a", "ls -A /").ok();
    let known = "bin boot dev etc home lib lib32 lib64 libx32 media mnt opt proc root run sbin srv sys tmp usr var";
    for name in root.lines() {
        assert!(known.split(' ').any(|k| k == name), "/{name} is inside");
    }
}

#[test]
fn sandboxes_do_not_see_each_others_processes_files_or_sockets() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    host.create("b");
    host.sh("a", "echo mine > /tmp/mine; echo mine > /dev/shm/mine").ok();
    host.cli(["exec", "-d", "a", "--", "sleep", "1000"]).ok();
    let listen = "import socket,time; s=socket.socket(socket.AF_UNIX); s.bind('\\0deltabox-test'); s.listen(); \
                  t=socket.socket(); t.bind(('127.0.0.1', 4711)); t.listen(); print('up', flush=True); time.sleep(1000)";
    let mut listener = host.command(["exec", "a", "--", "python3", "-c", listen]);
    let mut listener = listener.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 3];
    std::io::Read::read_exact(listener.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"up\n");

    assert_ne!(host.sh("b", "cat /tmp/mine /dev/shm/mine").code(), 0);
    assert_eq!(host.sh("b", "cat /proc/[0-9]*/comm | sort -u").ok().lines().filter(|l| *l == "sleep").count(), 0);
    let connect = |address: &str| {
        let script = format!("import socket; s=socket.socket({address}); print('in')");
        host.cli(["exec", "b", "--", "python3", "-c", &script]).stdout
    };
    assert_eq!(connect("socket.AF_UNIX); s.connect('\\0deltabox-test'"), "");
    assert_eq!(connect("socket.AF_INET); s.connect(('127.0.0.1', 4711)"), "");

    let host_pids = host.cli(["ps", "--json", "a"]).json();
    for process in host_pids["processes"].as_array().unwrap() {
        let pid = process["host_pid"].as_i64().unwrap();
        assert_ne!(host.sh("b", &format!("kill -9 {pid}")).code(), 0);
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(listener.id().cast_signed()), Signal::SIGTERM).unwrap();
    listener.wait().unwrap();
}

#[test]
fn init_survives_signals_and_cannot_be_traced_or_read_from_inside() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let before = host.inspect("a")["init_pid"].clone();
    host.sh("a", "kill -9 1; kill -TERM 1; kill -SEGV 1; kill -STOP 1; kill -9 -1; true");
    let seen = errnos(
        &host,
        "a",
        r#"
call("ptrace-attach", 101, 16, 1, 0, 0)
call("ptrace-seize", 101, 0x4206, 1, 0, 0)
call("pidfd_open", 434, 1, 0)
fd = libc.syscall(434, 1, 0)
call("pidfd_getfd", 438, fd, 3, 0)
buf = ctypes.create_string_buffer(64)
call("process_vm_readv", 310, 1, 0, 0, 0, 0, 0)
call("kcmp", 312, 1, 1, 0, 3, 3)
"#,
    );
    for (name, errno) in seen {
        let expected = match name.as_str() {
            "pidfd_open" => 0,
            // Zero vectors are refused or fine before the target is looked at; the data is not read either way.
            "process_vm_readv" => continue,
            _ => 1,
        };
        assert_eq!(errno, expected, "{name}");
    }
    for file in ["environ", "maps", "mem", "root/etc", "cwd", "fd/3", "exe"] {
        assert_ne!(host.sh("a", &format!("head -c 1 /proc/1/{file} || ls /proc/1/{file}/")).code(), 0, "{file}");
    }
    assert_eq!(host.inspect("a")["init_pid"], before);
    assert_eq!(host.sh("a", "echo alive").ok(), "alive");
}

#[test]
fn a_fork_bomb_ends_at_the_limit_and_the_sandbox_goes_on() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "a", "--pids", "40"]).ok();
    let bomb = "import os\nn=0\nwhile True:\n  try:\n    pid=os.fork()\n  except OSError as e:\n    print(n, e.errno); break\n  if pid==0:\n    import time; time.sleep(1000)\n  n+=1\n";
    let seen = host.cli(["exec", "a", "--", "python3", "-c", bomb]).ok();
    let (n, errno) = seen.split_once(' ').unwrap();
    assert_eq!(errno, "11", "EAGAIN");
    assert!((30..40).contains(&n.parse::<u32>().unwrap()), "{n} forks");
    // What room is left can be used; then the next command is refused at once, with the reason.
    let refused =
        (0..45).map(|_| host.cli(["exec", "-d", "--json", "a", "--", "sleep", "1000"])).find(|o| o.code() != 0);
    let error = refused.expect("the limit is reached").error();
    assert_eq!(error["code"], "start_failed", "{error}");
    host.cli(["kill", "a"]).ok();
    host.cli(["rm", "a"]).ok();
}

#[test]
fn memory_beyond_the_limit_is_not_had() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.cli(["create", "a", "--memory", "64M"]).ok();
    let hog = "x=bytearray(300<<20)\nfor i in range(0,len(x),4096): x[i]=1\nprint('had it')";
    let seen = host.cli(["exec", "a", "--", "python3", "-c", hog]);
    assert_ne!(seen.code(), 0);
    assert_eq!(seen.stdout, "");
    assert_eq!(host.sh("a", "echo alive").ok(), "alive");
}

#[test]
fn the_engines_socket_and_store_cannot_be_reached_from_inside() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    host.create("a");
    let paths = host.environment();
    for (_, path) in paths.iter().take(2) {
        assert_ne!(host.cli(["exec", "a", "--", "ls", &path.to_string_lossy()]).code(), 0);
    }
    // With the host's network, too: path names are looked up in the sandbox's own root.
    host.cli(["create", "b", "--net", "host"]).ok();
    let socket = paths[1].1.to_string_lossy().into_owned();
    let script = format!("import socket; socket.socket(socket.AF_UNIX).connect('{socket}')");
    assert_ne!(host.cli(["exec", "b", "--", "python3", "-c", &script]).code(), 0);
    assert_eq!(fs::metadata(host.store()).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(&paths[1].1).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn links_planted_in_the_tree_lead_nowhere_outside() {
    if skipped_without_root() {
        return;
    }
    let host = Host::start();
    let outside = host.scratch().join("precious");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "precious").unwrap();
    let path = outside.to_string_lossy().into_owned();
    host.create("a");
    // exec's working directory: a link is followed inside the sandbox, where the target does not exist.
    host.sh("a", &format!("ln -s {path} /tmp/link; ln -s / /tmp/root; ln -s {path}/file /tmp/file")).ok();
    assert_ne!(host.cli(["exec", "-w", "/tmp/link", "a", "--", "true"]).code(), 0);
    assert_eq!(host.cli(["exec", "-w", "/tmp/root", "a", "--", "ls", "-d", "work"]).stdout, "");
    assert_eq!(host.cli(["exec", "-w", "/proc/1/cwd", "a", "--", "ls", &path]).stdout, "");
    // logs: what a command prints, and what it does to descriptors behind /proc, stays in its own log.
    let pid =
        host.cli(["exec", "-d", "a", "--", "sh", "-c", "readlink /proc/self/fd/1; ln -sf /etc/shadow /tmp/1.log"]).ok();
    let log = host.cli(["logs", "a", &pid, "-f"]).ok();
    assert!(log.starts_with("pipe:"), "standard output is {log}");
    // rm: the links go, what they name stays.
    host.sh("a", &format!("mkdir -p /tmp/deep/x && ln -s {path} /tmp/deep/x/y && chmod 000 /tmp/deep")).ok();
    host.cli(["rm", "a"]).ok();
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "precious");
}
