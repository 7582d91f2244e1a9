// The measured program for Node, as program.py: MB, every how many pages one is written, `told` or `still`.
'use strict';
const fs = require('fs');
const [mb, step] = process.argv.slice(1).map(Number);
const mode = process.argv[3];
const memory = Buffer.alloc(mb << 20, 7);
const say = (...words) => fs.writeSync(1, words.join(' ') + '\n');

function told(byte, now) {
  if (byte === 100) {
    for (let at = 0; at < memory.length; at += step * 4096) memory[at] = 8;
    say('gone');
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
  }
  let wrong = 0;
  for (let at = 0; at < memory.length; at += step * 4096) wrong += memory[at] !== 7;
  say('back', now, wrong);
}

say('leader', process.pid);
say('ready', process.pid);
if (mode === 'told') {
  const one = Buffer.alloc(1);
  while (fs.readSync(0, one, 0, 1) === 1) told(one[0], process.hrtime.bigint());
} else {
  setInterval(() => {}, 1 << 30);
  fs.writeFileSync('/run/ready', '');
}
