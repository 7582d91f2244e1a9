# A database that is written to without end, and holds what the program knows.
import sqlite3
voice = Voice('0')
db = sqlite3.connect('/srv/laps.db', isolation_level=None)
db.execute('pragma journal_mode = ' + sys.argv[1])
db.execute('pragma wal_autocheckpoint = 20')
db.execute('create table laps (n integer primary key, value blob)')
total = 0
while True:
    n = voice.number
    found = db.execute('select max(n), count(*), total(length(value)) from laps').fetchone()
    if found != (n or None, n, total): die('at', n, total, 'and the database at', found)
    value = voice.random.randbytes(voice.random.randrange(2000))
    db.execute('begin')
    db.execute('insert into laps values (?, ?)', (n + 1, value))
    if n % 7 == 0:
        db.execute('rollback')
        db.execute('insert into laps values (?, ?)', (n + 1, value))
    else:
        db.execute('commit')
    total += len(value)
    if n % 100 == 99 and db.execute('pragma quick_check').fetchall() != [('ok',)]: die('at', n, 'the database is broken')
    voice.lap(sha(db.execute('select value from laps where n = ?', (voice.random.randrange(n + 1) + 1,)).fetchone()))
