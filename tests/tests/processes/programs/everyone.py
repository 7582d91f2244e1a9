# What kill(-1) does and says, as a list of lines: the same wherever there is nobody else.
import errno, os, signal, sys, time

def kill(number):
    try:
        os.kill(-1, number)
        return 'ok'
    except OSError as error:
        return errno.errorcode[error.errno]

def child(user, told, **handlers):
    """A process of `user` that tells of each signal; ready when it says so."""
    pid = os.fork()
    if pid == 0:
        if user:
            os.setgid(user)
            os.setuid(user)
        for name in handlers:
            number = getattr(signal, name)
            signal.signal(number, lambda got, _: os.write(told, b'%d of %d\n' % (got, user)))
        os.write(told, b'ready\n')
        while True:
            time.sleep(100)
    return pid

def lines(source, n):
    text = b''
    while text.count(b'\n') < n:
        text += os.read(source, 1000)
    return sorted(text.decode().split('\n')[:-1])

print('alone', kill(0), kill(signal.SIGTERM), kill(64), kill(65))
source, told = os.pipe()
signal.signal(signal.SIGUSR1, lambda *_: print('the caller got it'))
children = [child(user, told, SIGUSR1=1, SIGTERM=1) for user in (0, 0, 1000, 1000, 2000)]
lines(source, 5)
print('others', kill(0), kill(65), kill(-3))
print('all', kill(signal.SIGUSR1), lines(source, 5))

def by(user, number):
    """The same by a process of that user, which is not one of its own receivers."""
    answer, answered = os.pipe()
    if os.fork() == 0:
        os.setgid(user)
        os.setuid(user)
        os.write(answered, kill(number).encode())
        os._exit(0)
    os.wait()
    return os.read(answer, 100).decode()

print('own', by(1000, signal.SIGUSR1), lines(source, 2))
print('nobody', by(3000, signal.SIGUSR1), by(3000, 65))

# Of a session: any user lets it go on.
signal.signal(signal.SIGCONT, lambda *_: None)
for pid in children:
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
print('goes on', by(3000, signal.SIGCONT), [os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1]) for pid in children])

# Real-time signals too, and who has sent it.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
me = os.getpid()
pid = os.fork()
if pid == 0:
    os._exit(0 if kill(signal.SIGRTMIN) == 'ok' else 1)
got = signal.sigwaitinfo([signal.SIGRTMIN])
print('sender', got.si_pid == pid, got.si_uid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
ended = {os.waitpid(one, 0)[1] for one in children}
print('ended by it', sorted(os.WTERMSIG(status) for status in ended) == [signal.SIGRTMIN])

zombie = os.fork()
if zombie == 0:
    os._exit(0)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
print('a zombie', kill(9), kill(0))
os.wait()
print('alone', kill(0))
