// Compares the tokenizer's WebAssembly with @huggingface/tokenizers, which transformers.js uses, in
// Node or on a page: texts of different lengths, ids checked first, rounds interleaved.
//
//   npm install --prefix /tmp/peers @huggingface/tokenizers
//   node bench/tokenizer_node.mjs FOLDER TEXT.txt /tmp/peers/node_modules/@huggingface/tokenizers
//
// FOLDER has vocab.txt, tokenizer.json and tokenizer_config.json of one vocabulary; TEXT.txt is UTF-8.
// The last line is one JSON object: MB of text a second, one thread, the median of the rounds.

import { readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { Tokenizer } from '../mvbert/publish/page/tokenizer.mjs';

const [folder, textFile, peer] = process.argv.slice(2);
const ROUNDS = 5, BYTES = 2_000_000;
const { Tokenizer: Peer } = await import(pathToFileURL(resolve(join(peer, 'dist', 'tokenizers.mjs'))));

const config = JSON.parse(readFileSync(join(folder, 'tokenizer_config.json'), 'utf8'));
const ours = await Tokenizer.load({
  vocab: readFileSync(join(folder, 'vocab.txt')),
  cased: config.do_lower_case === false, keepAccents: config.strip_accents === false,
});
const theirs = new Peer(JSON.parse(readFileSync(join(folder, 'tokenizer.json'), 'utf8')), config);
const text = new TextDecoder().decode(readFileSync(textFile).subarray(0, BYTES));

const SHAPES = { lines: text.split('\n').filter(Boolean), one: [text.slice(0, 200_000)] };
const RUNS = {
  mvbert: (texts) => texts.reduce((sum, part) => sum + ours.encode(part).length, 0),
  huggingface: (texts) => texts.reduce((sum, part) => sum + theirs.encode(part).ids.length, 0),
};
const report = {};
for (const [shape, texts] of Object.entries(SHAPES)) {
  const megabytes = texts.reduce((sum, part) => sum + Buffer.byteLength(part), 0) / 1e6;
  const counts = Object.values(RUNS).map((run) => run(texts));
  const different = texts.filter((part) => {
    const [a, b] = [ours.encode(part), theirs.encode(part).ids];
    return a.length !== b.length || a.some((id, i) => id !== b[i]);
  }).length;
  const times = { mvbert: [], huggingface: [] };
  for (let round = 0; round < ROUNDS; ++round) {
    for (const [name, run] of Object.entries(RUNS)) {
      const started = performance.now();
      run(texts);
      times[name].push(performance.now() - started);
    }
  }
  report[shape] = { texts: texts.length, megabytes, pieces: counts[0], different };
  for (const [name, list] of Object.entries(times)) {
    const middle = list.sort((a, b) => a - b)[ROUNDS >> 1];
    report[shape][name] = Number((megabytes / (middle / 1000)).toPrecision(3));
  }
}
console.log(JSON.stringify({ node: process.version, ...report }));
