import sqlite3

def connect():
    db = sqlite3.connect('bank.db', timeout=60, isolation_level=None)
    db.execute('pragma synchronous = normal')
    db.execute('pragma wal_autocheckpoint = 50')
    return db

# What any snapshot shows, whoever writes meanwhile.
def look(db, n_seen):
    db.execute('begin')
    n = db.execute('select count(*) from moves').fetchone()[0]
    assert db.execute('select coalesce(max(id), 0) from moves').fetchone()[0] == n >= n_seen, 'a row lost'
    assert db.execute('select sum(balance) from accounts').fetchone()[0] == 100_000, 'a snapshot torn'
    db.execute('commit')
    return n

if len(sys.argv) > 1:
    db, n, n_looks = connect(), 0, 0
    while not os.path.exists('/srv/work/done'):
        n = look(db, n)
        n_looks += 1
        if n_looks % 50 == 0:
            assert db.execute('pragma quick_check').fetchone()[0] == 'ok'
    assert n_looks >= 10, n_looks
    sys.exit()

db = connect()
assert db.execute('pragma journal_mode = wal').fetchone()[0] == 'wal'
db.execute('create table accounts (id integer primary key, balance integer)')
db.execute('create table moves (id integer primary key, a integer, b integer, n integer, why blob)')
db.execute('create index by_a on moves (a, n)')
db.executemany('insert into accounts values (?, 1000)', [(n,) for n in range(100)])
readers = [subprocess.Popen(['/usr/bin/python3', '-c', os.environ['PROGRAM'], 'read']) for _ in range(2)]

def one(n):
    for k in range(20):
        a, b = (n * 7 + k) % 100, (n * 13 + k * 3) % 100
        db.execute('begin immediate')
        db.execute('update accounts set balance = balance - ? where id = ?', (k, a))
        db.execute('update accounts set balance = balance + ? where id = ?', (k, b))
        db.execute('insert into moves (a, b, n, why) values (?, ?, ?, ?)', (a, b, k, bytes_of(30, n, k)))
        db.execute('rollback' if k == 19 else 'commit')
    # Readers without a pause never let the log begin anew, and each checkpoint of the sandbox copies it.
    if n % 20 == 19:
        db.execute('pragma wal_checkpoint(restart)')

rounds(one)
write('/srv/work/done', b'')
assert [reader.wait() for reader in readers] == [0, 0], 'readers'
print(db.execute('pragma integrity_check').fetchall(), look(db, 0))
for table in ['accounts', 'moves']:
    print(hashlib.sha256(repr(db.execute(f'select * from {table} order by id').fetchall()).encode()).hexdigest())
print(db.execute('pragma wal_checkpoint(truncate)').fetchone()[0])
# sqlite leaves -wal and -shm in place when the inode number of its file has changed (docs/checkpoints.md).
db.close()
db = connect()
print(db.execute('pragma integrity_check').fetchall(), look(db, 0))
db.close()
print(sorted(os.listdir('.')))
