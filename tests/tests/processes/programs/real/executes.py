# Writes programs and executes them at once: nobody else may have them open for writing then (ETXTBSY).
voice = Voice('0', n_files=0)
while True:
    path = f'/srv/program{voice.number % 3}'
    number = voice.random.randrange(100)
    if os.path.exists(path): os.unlink(path)
    # Most of the time one is open.
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o755)
    os.write(file, f'#!/bin/sh\n'.encode())
    time.sleep(0.01)
    os.write(file, f'exit {number}\n'.encode())
    os.close(file)
    status = os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(path, [path], {}), 0)[1])
    if status != number: die(path, 'exits with', status, 'and should with', number)
    voice.lap(status)
