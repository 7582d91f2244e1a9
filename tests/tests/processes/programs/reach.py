# Tries to reach each number that no program has, by every call that takes one. Prints what did not say "no such process".
import ctypes, ctypes.util, errno, os, struct, fcntl, signal, socket

libc = ctypes.CDLL(None, use_errno=True)
FIRST = 1 << 20
there = sorted(int(name) for name in os.listdir('/proc') if name.isdigit() and int(name) >= FIRST)
assert there, 'no template shows as a number'
numbers = sorted({number + d for number in there for d in (-2, -1, 0, 1, 2)} - set(range(FIRST)))
buffer = ctypes.create_string_buffer(4096)
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
CALLS = {
    'kill': (62, 'n', 9), 'kill of a group': (62, '-', 9), 'tkill': (200, 'n', 9), 'tgkill': (234, 'n', 'n', 9),
    'rt_sigqueueinfo': (129, 'n', 9, buffer), 'rt_tgsigqueueinfo': (297, 'n', 'n', 9, buffer),
    'pidfd_open': (434, 'n', 0), 'attach': (101, PTRACE_ATTACH, 'n', 0, 0), 'seize': (101, PTRACE_SEIZE, 'n', 0, 0),
    'process_vm_readv': (310, 'n', buffer, 0, buffer, 0, 0), 'process_vm_writev': (311, 'n', buffer, 0, buffer, 0, 0),
    'prlimit64': (302, 'n', 7, 0, buffer), 'kcmp': (312, 'n', 'n', 1, 0, 0), 'kcmp with own': (312, os.getpid(), 'n', 1, 0, 0),
    'getpgid': (121, 'n'), 'getsid': (124, 'n'), 'setpgid': (109, 'n', 0), 'getpriority': (140, 0, 'n'),
    'setpriority': (141, 0, 'n', 5), 'setpriority of a group': (141, 1, 'n', 5), 'ioprio_get': (252, 1, 'n'),
    'ioprio_set': (251, 1, 'n', 0), 'sched_getaffinity': (204, 'n', 128, buffer), 'sched_setaffinity': (203, 'n', 128, buffer),
    'sched_getscheduler': (145, 'n'), 'sched_setscheduler': (144, 'n', 0, buffer), 'sched_getparam': (143, 'n', buffer),
    'sched_setparam': (142, 'n', buffer), 'sched_getattr': (315, 'n', buffer, 56, 0), 'sched_setattr': (314, 'n', buffer, 0),
    'sched_rr_get_interval': (148, 'n', buffer), 'get_robust_list': (274, 'n', buffer, buffer),
}
for number in numbers:
    for name, words in CALLS.items():
        put = {'n': number, '-': -number}
        args = [put.get(word, word) if isinstance(word, str) else word for word in words]
        args = [ctypes.c_long(word) if isinstance(word, int) else word for word in args]
        ctypes.set_errno(0)
        if libc.syscall(*args) != -1 or ctypes.get_errno() != errno.ESRCH:
            print(name, number, errno.errorcode.get(ctypes.get_errno()))
# What only its directory in /proc would allow.
for number in there:
    if os.listdir(f'/proc/{number}'):
        print('not empty:', number)
    for name in 'stat', 'status', 'cmdline', 'comm', 'mem', 'maps', 'exe', 'fd', 'task', f'task/{number}/stat', 'oom_score_adj', 'ns/mnt':
        try:
            os.stat(f'/proc/{number}/{name}')
            print('there:', number, name)
        except FileNotFoundError:
            pass
    fd = os.open(f'/proc/{number}', os.O_RDONLY | os.O_DIRECTORY)
    if libc.syscall(424, fd, 9, 0, 0) != -1 or ctypes.get_errno() != errno.EBADF:
        print('pidfd_send_signal', number)
# A descriptor that tells its owner: only of what he has blocked.
ours, theirs = socket.socketpair()
for number in there:
    for kind in 1, 2:
        fcntl.fcntl(ours, 15, struct.pack('ii', kind, number))  # F_SETOWN_EX
        for word in signal.SIGKILL, signal.SIGSTOP:
            try:
                fcntl.fcntl(ours, 10, int(word))  # F_SETSIG
                print('F_SETSIG', word)
            except OSError:
                pass
        for word in 0, signal.SIGTERM, signal.SIGSEGV, signal.SIGRTMAX:
            fcntl.fcntl(ours, 10, int(word))
            fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC)
            theirs.send(b'x')
            ours.recv(1)
print('done')
