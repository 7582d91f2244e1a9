# Comes before each program: works in rounds, as many as ROUNDS says, or until /srv/enough exists.
import hashlib, os, shutil, socket, stat, subprocess, sys, threading, time

def rounds(one):
    told = os.environ['ROUNDS']
    n = 0
    while n < int(told) if told else n < 2 or not os.path.exists('/srv/enough'):
        one(n)
        n += 1
    print('rounds', n)

# A command's output; its failure is ours.
def run(*words, **more):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    text = done.stdout.decode()
    if done.returncode:
        sys.exit(f'{words}: {done.returncode}\n{text}')
    return text.strip()

# The same bytes for the same words, on any machine.
def bytes_of(n, *words):
    seed = hashlib.sha256(repr(words).encode()).digest()
    return (seed * (n // len(seed) + 1))[:n]

def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)

# All there is to a tree but its times.
def digest(top, without=()):
    all = hashlib.sha256()
    for at, dirs, files in os.walk(top):
        dirs[:] = sorted(d for d in dirs if d not in without)
        for name in sorted(dirs + files):
            path = os.path.join(at, name)
            info = os.lstat(path)
            all.update(repr((path, info.st_mode, info.st_uid, info.st_gid)).encode())
            if stat.S_ISREG(info.st_mode):
                all.update(open(path, 'rb').read())
            elif stat.S_ISLNK(info.st_mode):
                all.update(os.readlink(path).encode())
    return all.hexdigest()

os.makedirs('/srv/work', exist_ok=True)
os.chdir('/srv/work')
write('/srv/started', b'')
