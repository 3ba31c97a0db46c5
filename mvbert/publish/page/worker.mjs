// The model, away from the page's own thread: answers one message at a time.
//
// Each message is { number, task, texts }; the reply { number, results, milliseconds, pieces } or
// { number, error }. Texts are run one by one: nothing is padded.

import * as ort from './ort/ort.wasm.min.mjs';
import { Tokenizer } from './tokenizer.mjs';

const SHOWN = 8;  // likeliest pieces of a mask

let config, tokenizer, session;

async function load() {
  const get = async (file) => {
    const response = await fetch(file);
    if (!response.ok) throw new Error(`cannot load ${file}: ${response.status}`);
    return response;
  };
  config = await (await get('page.json')).json();
  ort.env.wasm.numThreads = 1;  // more need headers that a static host does not send
  ort.env.wasm.wasmPaths = new URL('ort/', import.meta.url).href;
  const [vocab, model] = await Promise.all(
    ['vocab.txt', 'model.onnx'].map(async (file) => (await get(file)).arrayBuffer()));
  tokenizer = await Tokenizer.load({ vocab, ...config.tokenizer });
  session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ['wasm'] });
  await forward('');  // the first run is slower
}

async function forward(text) {
  const { inputIds, attentionMask, tokenTypeIds, dims } =
    tokenizer.encodeBatch([text], { maxLength: config.maxLength });
  const given = { input_ids: inputIds, attention_mask: attentionMask, token_type_ids: tokenTypeIds };
  const feeds = Object.fromEntries(session.inputNames.map(
    (name) => [name, new ort.Tensor('int64', given[name], dims)]));
  const outputs = await session.run(feeds);
  const output = outputs[config.output];
  const ids = Array.from(inputIds, Number);
  return { ids, values: output.data, width: output.dims.at(-1), intents: outputs.intent_logits?.data };
}

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(scores, (score) => Math.exp(score - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

const row = ({ values, width }, i) => values.subarray(i * width, (i + 1) * width);

/** The places of the largest values, the largest first. */
function top(values, count) {
  const best = [];
  values.forEach((value, i) => {
    if (best.length === count && value <= values[best.at(-1)]) return;
    const place = best.findIndex((other) => values[other] < value);
    best.splice(place < 0 ? best.length : place, 0, i);
    best.length = Math.min(best.length, count);
  });
  return best;
}

// By task: what a text becomes.
const ANSWERS = {
  // For each [MASK], its likeliest pieces.
  fill(text, output) {
    const mask = tokenizer.id('[MASK]');
    return output.ids.flatMap((id, i) => {
      if (id !== mask) return [];
      const shares = softmax(row(output, i));
      return [top(shares, SHOWN).map((piece) => [tokenizer.piece(piece), shares[piece]])];
    });
  },
  // Shares of the labels of a text.
  labels(text, output) {
    const scores = row(output, 0);
    const shares = config.independent
      ? Array.from(scores, (score) => 1 / (1 + Math.exp(-score))) : softmax(scores);
    return shares.map((share, i) => [config.labels[i], share]);
  },
  // Words with labels: [begin, end, label]. A word has the label of its first piece. A joint model
  // scores labels of the text too.
  slots(text, output) {
    const intents = softmax(output.intents ?? []).map((share, i) => [config.intents[i], share]);
    const { ids, spans } = tokenizer.encodeSpans(text);
    const words = [];
    for (let i = 0; i < Math.min(ids.length, output.ids.length - 2); ++i) {
      const [begin, end] = spans.subarray(2 * i, 2 * i + 2);
      if (tokenizer.piece(ids[i]).startsWith('##') && words.length > 0 && words.at(-1)[1] === begin) {
        words.at(-1)[1] = end;
      } else {
        words.push([begin, end, config.labels[top(row(output, i + 1), 1)[0]]]);
      }
    }
    return { words, intents };
  },
  // A vector of length 1.
  search(text, output) {
    const norm = Math.hypot(...output.values) || 1;
    return output.values.map((value) => value / norm);
  },
};

const loaded = load().then(
  () => postMessage({ ready: config }),
  (error) => {
    postMessage({ failed: error.message });
    throw error;
  });

let last = loaded;
self.onmessage = ({ data: { number, texts } }) => {
  last = last.then(async () => {
    try {
      const results = [], milliseconds = [];
      let pieces = 0, cut = false;
      for (const text of texts) {
        const started = performance.now();
        const output = await forward(text);
        results.push(ANSWERS[config.task](text, output));
        milliseconds.push(performance.now() - started);
        pieces += output.ids.length;
        cut ||= output.ids.length === config.maxLength && tokenizer.encode(text).length > config.maxLength;
      }
      postMessage({ number, results, milliseconds, pieces, cut });
    } catch (error) {
      postMessage({ number, error: error.message });
    }
  });
};
