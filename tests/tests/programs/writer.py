# Four threads, each with three files of its own: a log that grows, a counter written in place, one mapped into memory.
import mmap, os, threading, time

def work(k):
    log = os.open(f'/srv/log{k}', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    place = os.open(f'/srv/place{k}', os.O_CREAT | os.O_RDWR)
    mapped = os.open(f'/srv/mapped{k}', os.O_CREAT | os.O_RDWR)
    os.ftruncate(mapped, 4096)
    memory = mmap.mmap(mapped, 4096)
    n = 0
    while not os.path.exists('/srv/enough'):
        n += 1
        record = n.to_bytes(8, 'little')
        assert os.write(log, record) == 8
        assert os.pwrite(place, record, 0) == 8
        memory[:8] = record
        time.sleep(0.0003)

threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
