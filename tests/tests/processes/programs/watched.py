# A region of memory, all the ways to change it, and what it looks like from inside.
import ctypes, hashlib, os, random, threading
libc = ctypes.CDLL(None, use_errno=True)
for name in ('mmap', 'mremap'): getattr(libc, name).restype = ctypes.c_void_p
PAGE, N = 4096, 24 << 20
READ, WRITE, PRIVATE, FIXED, ANONYMOUS, MAYMOVE = 1, 2, 2, 0x10, 0x20, 1
HUGEPAGE, DONTNEED = 14, 4
def word(n): return ctypes.c_size_t(n)
def mapped(at, length, protection=READ | WRITE, flags=PRIVATE | ANONYMOUS | FIXED, file=-1):
    got = libc.mmap(word(at), word(length), protection, flags, file, word(0))
    assert got not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
    return got
def worked(result): assert result == 0, ctypes.get_errno()
base = mapped(0, N, flags=PRIVATE | ANONYMOUS)
region = (ctypes.c_char * N).from_address(base)
memory = memoryview(region).cast('B')
dice = random.Random(5)
for at in range(0, N, PAGE): memory[at:at + 8] = dice.randbytes(8)
heap = {}
def some(n=16): return [PAGE * dice.randrange(N // PAGE) for _ in range(n)]
def stretch(n_pages): return PAGE * dice.randrange(N // PAGE - n_pages), n_pages * PAGE

def stores():
    for at in some(): memory[at + 100:at + 120] = dice.randbytes(20)
def kernel_writes():
    "read(2) into it."
    with open('/dev/urandom', 'rb', buffering=0) as source:
        for at in some(): source.readinto(memory[at:at + 3000])
def own_mem_file():
    "As a debugger writes."
    file = os.open('/proc/self/mem', os.O_RDWR)
    for at in some(): os.pwrite(file, dice.randbytes(50), base + at)
    os.close(file)
def dropped():
    at, length = stretch(40); worked(libc.madvise(word(base + at), word(length), DONTNEED))
def dropped_and_read():
    at, length = stretch(40); worked(libc.madvise(word(base + at), word(length), DONTNEED)); sum(memory[at:at + length:PAGE])
def mapped_anew():
    at, length = stretch(60); mapped(base + at, length); memory[at:at + 20] = dice.randbytes(20)
def unmapped_first():
    at, length = stretch(60); worked(libc.munmap(word(base + at), word(length))); mapped(base + at, length)
    for page in range(at, at + length, PAGE): memory[page] = dice.randrange(256)
def protected():
    at, length = stretch(50); worked(libc.mprotect(word(base + at), word(length), READ))
    worked(libc.mprotect(word(base + at), word(length), READ | WRITE)); memory[at:at + 9] = dice.randbytes(9)
def left_protected():
    at, length = stretch(3); memory[at:at + 9] = dice.randbytes(9); worked(libc.mprotect(word(base + at), word(length), READ))
def away_and_back():
    at, length = stretch(30); other = mapped(0, length, flags=PRIVATE | ANONYMOUS)
    moved = libc.mremap(word(base + at), word(length), word(length), MAYMOVE | 2, word(other))
    if moved != other: return mapped(base + at, length)  # It is in pieces.
    (ctypes.c_char * length).from_address(other)[5] = dice.randrange(256)
    moved = libc.mremap(word(other), word(length), word(length), MAYMOVE | 2, word(base + at)); assert moved == base + at
def one_over_another():
    "Pages of one place at another, where what was there was not written."
    (at, length), (to, _) = stretch(20), stretch(20)
    if abs(at - to) >= length:
        moved = libc.mremap(word(base + at), word(length), word(length), MAYMOVE | 2, word(base + to))
        # What is in pieces stays where it is; the place is cleared all the same.
        if moved != base + to: mapped(base + to, length)
        mapped(base + at, length)
def huge():
    at = -(-(base + (4 << 20)) // (2 << 20)) * (2 << 20) - base
    worked(libc.madvise(word(base + at), word(2 << 20), HUGEPAGE)); worked(libc.madvise(word(base + at), word(2 << 20), DONTNEED))
    for page in range(at, at + (2 << 20), 64 * PAGE): memory[page:page + 8] = dice.randbytes(8)
def a_file_over_it():
    with open('/srv/page', 'wb') as file: file.write(dice.randbytes(8 * PAGE))
    at, length = stretch(8)
    with open('/srv/page', 'rb') as file: mapped(base + at, length, flags=PRIVATE | FIXED, file=file.fileno())
    memory[at + PAGE] = dice.randrange(256)
def a_child_writes():
    pid = os.fork()
    if pid == 0:
        for at in some(): memory[at] = 1
        os._exit(0)
    os.waitpid(pid, 0)
def by_another_thread():
    thread = threading.Thread(target=stores); thread.start(); thread.join()
def guards():
    "Made and taken away again, the page is another one then."
    at, length = stretch(4); worked(libc.madvise(word(base + at), word(length), 102)); worked(libc.madvise(word(base + at), word(length), 103))
def left_guarded():
    at, length = stretch(2); worked(libc.madvise(word(base + at), word(length), 102)); guarded.append((at, length))
def locked():
    at, length = stretch(10); worked(libc.mlock(word(base + at), word(length))); memory[at:at + 7] = dice.randbytes(7); worked(libc.munlock(word(base + at), word(length)))
def much(): memory[:N // 2] = dice.randbytes(N // 2)
def the_heap():
    heap[dice.randrange(6)] = [dice.randbytes(40) for _ in range(60000)]
def nothing(): pass
ways = [stores, kernel_writes, own_mem_file, dropped, dropped_and_read, mapped_anew, unmapped_first, protected,
    left_protected, guards, left_guarded, away_and_back, one_over_another, huge, a_file_over_it, a_child_writes, by_another_thread, locked,
    much, the_heap, nothing]
guarded = []
def reset():
    worked(libc.mprotect(word(base), word(N), READ | WRITE))
    while guarded:
        at, length = guarded.pop()
        with open('/proc/self/pagemap', 'rb') as entries:
            entries.seek((base + at) // PAGE * 8); assert entries.read(8)[7] & 4, 'no guard page any more'
        worked(libc.madvise(word(base + at), word(length), 103))

def digest():
    reset()
    sums = hashlib.sha256(memory)
    for key in sorted(heap): sums.update(b''.join(heap[key]))
    return sums.hexdigest() + str(dice.getstate()[1][-1])
def mappings():
    "Those of the region: flags and kilobytes that no template has too."
    found = []
    for line in open('/proc/self/smaps'):
        if line[0] not in 'ABCDEFGHIJKLMNOPQRSTUVWXYZ':
            start, end = (int(word, 16) for word in line.split(' ')[0].split('-'))
            inside = start < base + N and end > base
            if inside: found.append([[], 0])
        elif inside and line.startswith('VmFlags:'): found[-1][0] = line.split()[1:]
        elif inside and line.startswith('Private_Dirty:'): found[-1][1] = int(line.split()[1])
    return found
