# Laps of a program, each said in a file (real/said.rs). It knows what all its files hold, and ends when they do not.
import hashlib, os, random, sys, threading, time

def die(*words):
    os.write(1, (' '.join(map(str, words)) + '\n').encode())
    os._exit(3)

def sha(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

class Voice:
    def __init__(self, name, n_files=5):
        self.path, self.number, self.lines = f'/srv/said.{name}', 0, []
        self.random = random.Random(str(name))
        self.heap = [self.random.randbytes(self.random.randrange(2000)) for _ in range(200)]
        self.tree, self.files = f'/srv/tree.{name}', {}
        self.n_files = n_files
        os.mkdir(self.tree)

    # The files must be those of the lap that memory is at.
    def check(self):
        if self.lines and open(self.path).read().split('\n')[-2:] != [self.lines[-1], '']:
            die(self.path, 'is', open(self.path).read()[-200:], 'and should be', self.lines[-1])
        found = {name: open(f'{self.tree}/{name}').read() for name in os.listdir(self.tree)}
        if found != self.files:
            die(self.path, self.number, 'has files', found, 'and should have', self.files)

    # Changes a little of memory and of files, and says what it is then. `more` must follow from the lap's number.
    def lap(self, more=''):
        self.check()
        if self.number % 1000 == 999:
            os.rename(self.path, self.path + '.old')
            self.lines = []
        self.number += 1
        numbers = [self.random.getrandbits(64) for _ in range(16)]
        for n in numbers[:4]:
            self.heap[n % 200] = self.random.randbytes(n % 3000)
        if self.n_files:
            name = f'f{numbers[0] % self.n_files}'
            if name in self.files and numbers[1] % 3 == 0:
                os.unlink(f'{self.tree}/{name}')
                del self.files[name]
            else:
                self.files[name] = f'{self.number} {numbers[2]}'
                with open(f'{self.tree}/{name}', 'w') as file: file.write(self.files[name])
        heap = hashlib.sha256(b''.join(self.heap)).hexdigest()[:16]
        state = f'{self.number * 3} {sha(numbers)} {heap} {sha(sorted(self.files.items()))} {more}'
        line = f'{self.number} {time.time_ns() // 1000000} {state}'
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, (line + '\n').encode())
        os.close(file)
        self.lines = self.lines[-100:] + [line]
