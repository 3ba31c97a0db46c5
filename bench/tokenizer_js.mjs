// Compares the tokenizer's WebAssembly with @huggingface/tokenizers, which transformers.js uses: texts
// of different lengths, ids checked first, rounds interleaved. In Node, or with
// bench/tokenizer_page.py and the same arguments in Chromium:
//
//   npm install --prefix /tmp/peers @huggingface/tokenizers
//   node bench/tokenizer_js.mjs FOLDER TEXT.txt /tmp/peers/node_modules/@huggingface/tokenizers
//
// FOLDER has vocab.txt, tokenizer.json and tokenizer_config.json of one vocabulary; TEXT.txt is UTF-8.
// The last line is one JSON object: MB of text a second, one thread, the median of the rounds.

import { Tokenizer } from '../mvbert/publish/page/tokenizer.mjs';

const ROUNDS = 5, BYTES = 2_000_000;

// Peer: their class; read(name): the bytes of a file of FOLDER; text: the bytes of the text.
export async function compare(Peer, read, textBytes) {
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const config = await json('tokenizer_config.json');
  const ours = await Tokenizer.load({
    vocab: await read('vocab.txt'),
    cased: config.do_lower_case === false, keepAccents: config.strip_accents === false,
  });
  const theirs = new Peer(await json('tokenizer.json'), config);
  const text = new TextDecoder().decode(textBytes.slice(0, BYTES));

  const SHAPES = { lines: text.split('\n').filter(Boolean), one: [text.slice(0, 200_000)] };
  const RUNS = {
    mvbert: (texts) => texts.reduce((sum, part) => sum + ours.encode(part).length, 0),
    huggingface: (texts) => texts.reduce((sum, part) => sum + theirs.encode(part).ids.length, 0),
  };
  const report = {};
  for (const [shape, texts] of Object.entries(SHAPES)) {
    const bytes = texts.reduce((sum, part) => sum + new TextEncoder().encode(part).length, 0);
    const megabytes = bytes / 1e6;
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
  return report;
}

if (globalThis.process?.argv[1]?.endsWith('tokenizer_js.mjs')) {
  const { readFileSync } = await import('node:fs');
  const { join, resolve } = await import('node:path');
  const { pathToFileURL } = await import('node:url');
  const [folder, textFile, peer] = process.argv.slice(2);
  const module = await import(pathToFileURL(resolve(join(peer, 'dist', 'tokenizers.mjs'))));
  const read = (name) => readFileSync(join(folder, name));
  const report = await compare(module.Tokenizer, read, readFileSync(textFile));
  console.log(JSON.stringify({ node: process.version, ...report }));
}
