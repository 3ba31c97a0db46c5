// Encodes texts for tests/publish/test_wasm.py: node encode.mjs TOKENIZER.mjs JOB.json RESULT.json

import { readFileSync, writeFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [module, job, result] = process.argv.slice(2);
const { Tokenizer } = await import(pathToFileURL(module));
const { vocab, options, texts, pairs } = JSON.parse(readFileSync(job, 'utf8'));
const tokenizer = await Tokenizer.load({ vocab: readFileSync(vocab), ...options });
const found = { ids: [], spans: [], slices: [], pieces: [], back: [] };
for (const text of texts) {
  found.ids.push(Array.from(tokenizer.encode(text)));
  const { ids, spans } = tokenizer.encodeSpans(text);
  found.spans.push([Array.from(ids), Array.from(spans)]);
}
for (let id = 0; id < tokenizer.size; ++id) {
  found.pieces.push(tokenizer.piece(id));
  found.back.push(tokenizer.id(tokenizer.piece(id)) ?? -1);
}
found.beyond = [tokenizer.piece(tokenizer.size), tokenizer.piece(-1), tokenizer.piece(0.5)].map((piece) => piece ?? null);
const { inputIds, attentionMask, tokenTypeIds, dims } =
  tokenizer.encodeBatch(texts.slice(0, pairs.length), { pairs, maxLength: 24, multiple: 16 });
found.batch = [inputIds, attentionMask, tokenTypeIds].map((array) => Array.from(array, Number));
found.dims = dims;
writeFileSync(result, JSON.stringify(found));
