# Chains of numbers, each made from the one before: whoever is at another place than its file says so and ends.
import hashlib, os, sys, threading, time

def run(k):
    path, n, value = f'/srv/chain{k}', 0, b'begin'
    while True:
        if n and open(path).read() != f'{n} {value.hex()}':
            print(k, 'is at', n, 'and its file at', open(path).read(), flush=True)
            os._exit(3)
        n, value = n + 1, hashlib.sha256(value + bytes([k])).digest()
        new = os.open(path + '.new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(new, f'{n} {value.hex()}'.encode())
        os.close(new)
        os.rename(path + '.new', path)
        if n % 50 == k: time.sleep(0.002)

for k in range(1, 5): threading.Thread(target=run, args=(k,), daemon=True).start()
run(0)
