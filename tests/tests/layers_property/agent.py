# Carries out file operations as it is told, one JSON object a line; answers one line each.
# Operations with "child" are carried out by a second process, to which descriptors are passed: they share descriptions.
import hashlib, json, mmap, os, socket, stat, sys

ROOT = '/srv/t'
fds, maps = {}, {}

def act(op):
    kind = op['op']
    path = ROOT + op['path'] if 'path' in op else None
    to = ROOT + op['to'] if 'to' in op else None
    data = op.get('data', '').encode()
    if kind == 'create': os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, op['mode']))
    elif kind == 'put':
        with open(path, 'r+b') as f: f.seek(op['at']); f.write(data)
    elif kind == 'append':
        with open(path, 'ab') as f: f.write(data)
    elif kind == 'truncate': os.truncate(path, op['size'])
    elif kind == 'rename': os.rename(path, to)
    elif kind == 'link': os.link(path, to)
    elif kind == 'symlink': os.symlink(op['data'], path)
    elif kind == 'unlink': os.unlink(path)
    elif kind == 'mkdir': os.mkdir(path, op['mode'])
    elif kind == 'rmdir': os.rmdir(path)
    elif kind == 'chmod': os.chmod(path, op['mode'])
    elif kind == 'chown': os.chown(path, op['uid'], op['gid'])
    elif kind == 'setxattr': os.setxattr(path, 'user.' + op['name'], data)
    elif kind == 'open': fds[op['fd']] = os.open(path, {'r': os.O_RDONLY, 'w': os.O_RDWR, 'a': os.O_RDWR | os.O_APPEND}[op['how']])
    elif kind == 'close': os.close(fds.pop(op['fd']))
    elif kind == 'write': os.write(fds[op['fd']], data)
    elif kind == 'seek': os.lseek(fds[op['fd']], op['at'], 0)
    elif kind == 'ftruncate': os.ftruncate(fds[op['fd']], op['size'])
    elif kind == 'position': return os.lseek(fds[op['fd']], 0, 1)
    elif kind == 'content': return os.pread(fds[op['fd']], 1 << 20, 0).decode()
    elif kind == 'map': maps[op['fd']] = mmap.mmap(fds[op['fd']], 0)
    elif kind == 'store': maps[op['fd']][op['at']:op['at'] + len(data)] = data
    elif kind == 'unmap': maps.pop(op['fd']).close()
    elif kind == 'look': return look()
    else: raise ValueError(kind)

def look():
    seen, links = [], {}
    for here, dirs, files in os.walk(ROOT):
        for name in ['.'] + files + [d for d in dirs if os.path.islink(here + '/' + d)]:
            path = here if name == '.' else here + '/' + name
            s = os.lstat(path)
            entry = {'path': path[len(ROOT):], 'mode': s.st_mode, 'uid': s.st_uid, 'gid': s.st_gid, 'mtime': s.st_mtime_ns}
            if stat.S_ISLNK(s.st_mode): entry['content'] = os.readlink(path)
            if stat.S_ISREG(s.st_mode):
                entry['content'] = open(path, 'rb').read().decode()
                if len(entry['content']) != s.st_size: entry['size'] = s.st_size
                links.setdefault((s.st_dev, s.st_ino), []).append(entry)
            if not stat.S_ISLNK(s.st_mode):
                entry['xattrs'] = {n: os.getxattr(path, n).decode() for n in sorted(os.listxattr(path))}
            seen.append(entry)
    for group in links.values():
        if len(group) > 1:
            for entry in group: entry['links'] = sorted(e['path'] for e in group)
    return sorted(seen, key=lambda entry: entry['path'])

def answer(op):
    try: return {'ok': act(op)}
    except OSError as error: return {'error': str(error)}

os.umask(0)
os.makedirs(ROOT, exist_ok=True)
mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if os.fork() == 0:
    mine.close()
    while True:
        message, received, _, _ = socket.recv_fds(its, 1 << 16, 1)
        if not message: os._exit(0)
        op = json.loads(message)
        if op['op'] == 'take':
            fds[op['fd']] = received[0]
            its.send(b'{"ok": null}')
        else: its.send(json.dumps(answer(op)).encode())
its.close()
for line in sys.stdin:
    op = json.loads(line)
    if op['op'] == 'share': socket.send_fds(mine, [json.dumps({'op': 'take', 'fd': op['fd']}).encode()], [fds[op['fd']]])
    elif op.get('child'): mine.send(line.encode())
    else:
        print(json.dumps(answer(op)), flush=True)
        continue
    print(mine.recv(1 << 16).decode(), flush=True)
