# Picks up where the one before it has ended, and ends after 150 laps.
import pickle
run = int(sys.argv[1])
voice = Voice('0', n_files=3) if run == 1 else pickle.load(open('/srv/voice', 'rb'))
while True:
    voice.lap(run)
    if voice.number % 150 == 0:
        pickle.dump(voice, open('/srv/voice', 'wb'))
        open('/srv/end', 'w').write(f'{run} {run % 90 + 1}')
        os._exit(run % 90 + 1)
