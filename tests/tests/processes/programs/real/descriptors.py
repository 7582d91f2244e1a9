# 500 descriptors of all kinds, each with what it should hold.
import select, tempfile
voice = Voice('0')
os.mkdir('/srv/held')
held = []

class Regular:
    def __init__(self, k):
        self.fd = os.open(f'/srv/held/{k}', os.O_RDWR | os.O_CREAT | (os.O_APPEND if k % 3 == 0 else 0))
        self.is_append, self.bytes, self.at = k % 3 == 0, b'', 0
    def step(self, n, data):
        if n % 4 == 0: self.at = os.lseek(self.fd, n % (len(self.bytes) + 1), 0)
        elif n % 4 == 1 and len(self.bytes) > 2000:
            os.ftruncate(self.fd, 100)
            self.bytes = self.bytes[:100]
            self.at = os.lseek(self.fd, 0, 0)
        elif n % 4 == 2:
            os.write(self.fd, data)
            if self.is_append: self.at = len(self.bytes)
            self.bytes = self.bytes[:self.at] + data + self.bytes[self.at + len(data):]
            self.at += len(data)
        else:
            got = os.read(self.fd, 50)
            if got != self.bytes[self.at:self.at + 50]: die('file', self.fd, 'at', self.at, got, self.bytes)
            self.at += len(got)
    def check(self):
        found = os.lseek(self.fd, 0, 1), os.pread(self.fd, 100000, 0)
        if found != (self.at, self.bytes): die('file', self.fd, found, self.at, self.bytes)
    def state(self): return (self.at, self.bytes)

class Shared(Regular):
    # The same description by another number.
    def __init__(self, other): self.other, self.fd = other, os.dup(other.fd)
    def step(self, n, data): pass
    def check(self):
        if os.lseek(self.fd, 0, 1) != self.other.at: die('copy', self.fd, 'of', self.other.fd)
    def state(self): return ()

class Pipe:
    def __init__(self, k):
        self.r, self.w = os.pipe2(os.O_NONBLOCK if k % 2 else 0)
        self.bytes = b''
    def step(self, n, data):
        if len(self.bytes) < 3000 and n % 2:
            os.write(self.w, data)
            self.bytes += data
        elif self.bytes:
            got = os.read(self.r, n % 100 + 1)
            if got != self.bytes[:n % 100 + 1]: die('pipe', self.r, got, self.bytes)
            self.bytes = self.bytes[n % 100 + 1:]
    def check(self):
        if bool(self.bytes) != bool(select.select([self.r], [], [], 0)[0]): die('pipe', self.r, self.bytes)
    def state(self): return self.bytes

class Event:
    def __init__(self, k):
        self.fd, self.count = os.eventfd(k, os.EFD_NONBLOCK), k
        self.epoll = select.epoll()
        self.epoll.register(self.fd, select.EPOLLIN)
    def step(self, n, data):
        if n % 2:
            os.eventfd_write(self.fd, n % 1000)
            self.count += n % 1000
        elif self.count:
            got = os.eventfd_read(self.fd)
            if got != self.count: die('eventfd', self.fd, got, self.count)
            self.count = 0
    def check(self):
        if bool(self.count) != bool(self.epoll.poll(0)): die('eventfd', self.fd, self.count)
    def state(self): return self.count

class Directory:
    def __init__(self, k): self.fd = os.open('/srv/held', os.O_RDONLY | (os.O_PATH if k % 2 else 0))
    def step(self, n, data): pass
    def check(self):
        if os.stat(f'{n_first}', dir_fd=self.fd).st_size < 0: die('directory')
    def state(self): return ()

class Memory(Regular):
    def __init__(self, k):
        self.fd = os.memfd_create(f'memory{k}')
        self.is_append, self.bytes, self.at = False, b'', 0

n_first = 0
held += [Regular(k) for k in range(220)]
held += [Shared(held[k]) for k in range(50)]
held += [Pipe(k) for k in range(70)]
held += [Event(k) for k in range(30)]
held += [Directory(k) for k in range(10)]
held += [Memory(k) for k in range(20)]
if len(os.listdir('/proc/self/fd')) < 500: die('only', len(os.listdir('/proc/self/fd')))
while True:
    for _ in range(20):
        n = voice.random.getrandbits(32)
        one = held[n % len(held)]
        one.check()
        one.step(voice.random.getrandbits(32), voice.random.randbytes(n % 60 + 1))
        one.check()
    if voice.number % 10 == 0:
        for one in held: one.check()
    voice.lap(sha([one.state() for one in held]) if voice.number % 10 == 0 else '')
