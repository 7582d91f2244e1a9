// Appends what it is sent to a file, watches that file, and serves both from a socket in the tree.
const fs = require('fs'), http = require('http');
const log = '/srv/work/log', socket = '/srv/work/app.sock';
fs.writeFileSync(log, '');
const held = fs.openSync(log, 'a');
let waiters = [];
fs.watch(log, () => { const all = waiters; waiters = []; all.forEach((go) => go()); });
const count = new Map();
http.createServer((request, response) => {
  let body = '';
  request.on('data', (data) => { body += data; });
  request.on('end', () => {
    if (request.url === '/quit') { response.end('bye', () => process.exit(0)); return; }
    const seen = new Promise((go) => waiters.push(go));
    const done = () => seen.then(() => fs.readFile(log, (error, data) => {
      count.set(body.length, (count.get(body.length) ?? 0) + 1);
      response.statusCode = error ? 500 : 200;
      response.end(error ? String(error) : String(data.toString().trim().split('\n').length));
    }));
    if (request.url === '/held') fs.write(held, body + '\n', done);
    else fs.appendFile(log, body + '\n', done);
  });
}).listen(socket, () => console.log('listening'));
