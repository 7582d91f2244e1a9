# Arrays and their threads: numpy's own generators, products that its library spreads over threads.
import numpy
voice = Voice('0')
generator = numpy.random.Generator(numpy.random.PCG64(7))
a = generator.standard_normal((300, 300))
held = [generator.integers(0, 1 << 60, 10000) for _ in range(50)]
while True:
    n = voice.number
    held[n % 50] = generator.integers(0, 1 << 60, 10000)
    for one in held[::7]: one[n % 10000] ^= n
    # Whole numbers: their sums do not depend on who adds first.
    b = generator.integers(-100, 100, (200, 200)).astype(numpy.float64)
    product = b @ b.T
    if product[n % 200, 0] != int((b[n % 200] * b[0]).sum()): die('product at', n)
    held_now = hashlib.sha256(b''.join(one.tobytes() for one in held)).hexdigest()[:16]
    voice.lap(f'{held_now} {int(product.sum())} {generator.integers(1 << 60)}')
