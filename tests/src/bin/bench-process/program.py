# The measured program: memory, and readers that wait until they are told something. Arguments: MB, `huge` or `small`,
# every how many pages one is written, how many generations (1, or 3: only the grandchild has the memory), `told`
# or `still` (nobody will tell it anything; a file says that it is ready).
import mmap, os, sys, threading, time

mb, pages, step, depth, mode = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
N_THREADS = 3
n_readers = depth - 1 + N_THREADS

def say(*words):
    os.write(1, (' '.join(map(str, words)) + '\n').encode())

# Pipes that all generations have: who has arrived, who may leave, and one that never has anything.
arrived, leave, never = os.pipe(), os.pipe(), os.pipe()

def all_arrive(is_first):
    os.write(arrived[1], b'x')
    if is_first:
        for _ in range(n_readers):
            os.read(arrived[0], 1)
        os.write(leave[1], b'x' * n_readers)
    os.read(leave[0], 1)

def read(is_first):
    while True:
        told = os.read(0 if mode == 'told' else never[0], 1)
        now = time.monotonic_ns()
        if not told:
            os._exit(0)
        if told == b'd':
            if is_first:
                for at in range(0, len(memory), step * 4096):
                    memory[at] = 8
            say('gone')
            os.read(never[0], 1)
        n_wrong = sum(memory[at] != 7 for at in range(0, len(memory), step * 4096)) if is_first else 0
        say('back', now, n_wrong)
        all_arrive(is_first)

memory = b''
for generation in range(1, depth):
    if os.fork():
        if generation == 1:
            say('leader', os.getpid())
        read(False)
memory = mmap.mmap(-1, mb << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE if pages == 'huge' else mmap.MADV_NOHUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 7
for _ in range(N_THREADS - 1):
    threading.Thread(target=read, args=(False,), daemon=True).start()
if depth == 1:
    say('leader', os.getpid())
say('ready', os.getpid())
if mode == 'still':
    open('/run/ready', 'w').close()
read(True)
