# A gigabyte, of which each lap changes some pages and looks at some others.
import zlib
voice = Voice('0', n_files=0)
N = 1 << 30
memory = bytearray(N)
block = voice.random.randbytes(1 << 20)
for at in range(0, N, 1 << 20): memory[at:at + (1 << 20)] = block
view = memoryview(memory)
while True:
    for _ in range(60):
        at = voice.random.randrange(N - 3000)
        memory[at:at + 3000] = voice.random.randbytes(3000)
    looked = [zlib.crc32(view[at:at + 300000]) for at in [voice.random.randrange(N - 300000) for _ in range(10)]]
    # All of it now and then.
    if voice.number % 40 == 39: looked.append(zlib.crc32(view))
    voice.lap(sha(looked))
