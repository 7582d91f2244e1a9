// Three workers and the main thread, each with a voice of its own, which pass numbers around in a ring.
const { Worker, isMainThread, workerData, parentPort } = require('worker_threads');
const fs = require('fs'), crypto = require('crypto');
const sha = (...of) => { const hash = crypto.createHash('sha256'); of.forEach((one) => hash.update(one)); return hash.digest('hex').slice(0, 16); };
const die = (why) => { fs.writeSync(1, why + '\n'); process.kill(process.pid, 'SIGKILL'); };

class Voice {
  constructor(name) {
    this.path = `/srv/said.${name}`; this.number = 0; this.line = ''; this.random = (name + 1) * 7919;
    this.heap = new Map();
  }
  next() { this.random = (this.random * 48271) % 2147483647; return this.random; }
  lap(more) {
    if (this.line) {
      const held = fs.readFileSync(this.path, 'utf8').trimEnd().split('\n').pop();
      if (held !== this.line) die(`${this.path} is at '${held}' and should be at '${this.line}'`);
    }
    if (this.number % 1000 === 999) fs.renameSync(this.path, this.path + '.old');
    this.number++;
    const numbers = Array.from({ length: 16 }, () => this.next());
    for (const n of numbers.slice(0, 4)) this.heap.set(n % 100, Buffer.alloc(n % 5000, String(n)));
    const heap = sha(...[...this.heap.keys()].sort((a, b) => a - b).map((key) => this.heap.get(key)));
    this.line = `${this.number} ${Date.now()} ${this.number * 3} ${sha(String(numbers))} ${heap} ${more}`.trimEnd();
    fs.appendFileSync(this.path, this.line + '\n');
  }
}

const voice = new Voice(isMainThread ? 0 : workerData);
if (isMainThread) {
  const workers = [1, 2, 3].map((k) => new Worker(__filename, { workerData: k }));
  const shared = new Int32Array(new SharedArrayBuffer(4096));
  workers.forEach((worker) => worker.postMessage(shared));
  let answers = [];
  const ask = () => workers.forEach((worker) => worker.postMessage(voice.number));
  workers.forEach((worker, k) => {
    worker.on('error', (error) => die(String(error)));
    worker.on('message', (n) => {
      if (n !== voice.number * (k + 1)) die(`worker ${k} answers ${n} at ${voice.number}`);
      answers.push(n);
      if (answers.length < 3) return;
      answers = [];
      if (shared[1] !== voice.number + 1 || shared[3] !== voice.number + 1) die(`shared ${shared.slice(0, 4)} at ${voice.number}`);
      // Now and then through a timer or the pool of threads.
      const go = () => { voice.lap(Atomics.load(shared, 2)); ask(); };
      if (voice.number % 10 === 3) setTimeout(go, 3);
      else if (voice.number % 10 === 7) crypto.pbkdf2('a', 'b', 10, 10, 'sha1', go);
      else go();
    });
  });
  ask();
} else {
  let shared;
  parentPort.on('message', (told) => {
    if (typeof told !== 'number') { shared = told; return; }
    if (told !== voice.number) die(`worker ${workerData} at ${voice.number} is asked for ${told}`);
    Atomics.add(shared, workerData, 1);
    voice.lap('');
    parentPort.postMessage(told * workerData);
  });
}
