# A database that is written to without end: what it holds is what the program knows.
import sqlite3, sys
db = sqlite3.connect('/srv/chain0.db', isolation_level=None)
db.execute('pragma journal_mode = ' + sys.argv[1])
db.execute('create table chain (n integer primary key, value integer)')
n, value = 0, 1
while True:
    found = db.execute('select max(n), count(*) from chain').fetchone()
    if found != (n or None, n):
        print('at', n, 'and the database at', found, flush=True)
        sys.exit(3)
    n, value = n + 1, value * 48271 % 2147483647
    db.execute('insert into chain values (?, ?)', (n, value))
    if n % 20 == 0: open('/srv/chain0.new', 'w').write(f'{n} {value}')
