# Five threads, each with a voice of its own, which hand numbers to each other.
import queue
sys.setswitchinterval(0.0005)
queues = [queue.Queue() for _ in range(5)]

def run(k):
    voice, got = Voice(k), 0
    while True:
        # A ring: each lap waits for the one before it.
        queues[(k + 1) % 5].put((k, voice.number))
        giver, number = queues[k].get()
        if (giver, number) != ((k - 1) % 5, voice.number): die(k, 'at', voice.number, 'was given', giver, number)
        got += number
        voice.lap(got)
        if voice.number % 50 == k: time.sleep(0.002)

for k in range(1, 5): threading.Thread(target=run, args=(k,), daemon=True).start()
run(0)
