// BERT's tokenizer as WebAssembly: the C interface of csrc/mvbert.h, for browsers, Node and Deno.
//
//   const tokenizer = await Tokenizer.load({ vocab: await (await fetch('vocab.txt')).arrayBuffer() });
//   tokenizer.encode('Hello, [MASK]!');      // Int32Array of ids, [CLS] and [SEP] among them
//   tokenizer.encodeBatch(['one', 'two']);   // what onnxruntime-web takes: BigInt64Arrays [2, T]
//
// tokenizer.d.mts has the types. Each tokenizer has memory of its own, which goes when it does.

const encoder = new TextEncoder();
// (A piece may begin with U+FEFF, which is otherwise taken for a byte order mark.)
const decoder = new TextDecoder('utf-8', { ignoreBOM: true });

const TRUNCATIONS = { longest_first: 0, only_first: 1, only_second: 2 };
const OPTIONS = 48, ADDED = 12, TEXT = 8, BATCH_OPTIONS = 64, BATCH = 32;  // sizes of structures

/** What a text, a vocabulary or an option is refused for; `status` is an mvbert_status. */
export class TokenizerError extends Error {
  constructor(message, status) {
    super(message);
    this.name = 'TokenizerError';
    this.status = status;
  }
}

async function compile(source) {
  if (source instanceof WebAssembly.Module) return source;
  if (source instanceof ArrayBuffer || ArrayBuffer.isView(source)) return WebAssembly.compile(source);
  const url = new URL(source, import.meta.url);
  if (url.protocol === 'file:') {
    const { readFile } = await import('node:fs/promises');
    return WebAssembly.compile(await readFile(url));
  }
  const response = await fetch(url);
  if (!response.ok) throw new TokenizerError(`cannot load ${url}: ${response.status}`, -2);
  return WebAssembly.compile(await response.arrayBuffer());
}

// What the C library of the module asks of a system: it has none.
function imports(module) {
  const result = {};
  for (const { module: group, name, kind } of WebAssembly.Module.imports(module)) {
    if (kind !== 'function') throw new TypeError(`the module needs ${group}.${name}, a ${kind}`);
    result[group] ??= {};
    result[group][name] = name === 'emscripten_notify_memory_growth' ? () => {} : () => 52;  // ENOSYS
  }
  return result;
}

function checkText(text) {
  if (typeof text === 'string') return text;
  throw new TypeError(`a text must be a string, got ${text === null ? 'null' : typeof text}`);
}

function bytesOf(vocab) {
  if (typeof vocab === 'string') return encoder.encode(vocab);
  if (vocab instanceof ArrayBuffer) return new Uint8Array(vocab);
  if (ArrayBuffer.isView(vocab)) return new Uint8Array(vocab.buffer, vocab.byteOffset, vocab.byteLength);
  throw new TypeError('vocab must be the bytes or the text of a vocab.txt');
}

export class Tokenizer {
  #c;  // the module's functions
  #tokenizer = 0;
  #scratch = 0;  // memory for texts and ids of one call
  #room = 0;

  static async load({ wasm = 'tokenizer.wasm', vocab, ...options }) {
    const module = await compile(wasm);
    return new Tokenizer(await WebAssembly.instantiate(module, imports(module)), vocab, options);
  }

  constructor(instance, vocab, { cased = false, keepAccents = false, added = [] } = {}) {
    this.#c = instance.exports;
    this.#c._initialize?.();
    const bytes = bytesOf(vocab);
    const held = [];
    const hold = (data) => {
      const at = this.#allocate(data.length);
      held.push(at);
      new Uint8Array(this.#c.memory.buffer).set(data, at);
      return at;
    };
    const pieces = added.map(({ piece }) => hold(encoder.encode(`${piece}\0`)));
    if (added.some(({ piece }) => piece.includes('\0'))) {
      throw new TokenizerError('an added piece has NUL in it', -3);
    }
    const list = hold(new Uint8Array(ADDED * added.length));
    const given = hold(new Uint8Array(OPTIONS)), result = hold(new Uint8Array(4));
    const text = hold(bytes);
    const view = new DataView(this.#c.memory.buffer);
    added.forEach(({ id, normalized }, i) => {
      view.setUint32(list + ADDED * i, pieces[i], true);
      view.setInt32(list + ADDED * i + 4, id, true);
      view.setInt32(list + ADDED * i + 8, normalized ? 1 : 0, true);
    });
    view.setInt32(given, cased ? 1 : 0, true);
    view.setInt32(given + 4, keepAccents ? 1 : 0, true);
    view.setUint32(given + 8, list, true);
    view.setUint32(given + 12, added.length, true);
    this.#call(() => this.#c.mvbert_from_memory(text, bytes.length, given, result));
    this.#tokenizer = new DataView(this.#c.memory.buffer).getUint32(result, true);
    held.forEach((at) => this.#c.free(at));
  }

  /** How many ids there are. */
  get size() {
    return this.#c.mvbert_size(this.#tokenizer);
  }

  /** The piece of an id; undefined if there is none. */
  piece(id) {
    const at = Number.isInteger(id) ? this.#c.mvbert_piece(this.#tokenizer, id) : 0;
    return at === 0 ? undefined : this.#string(at);
  }

  /** The id of a piece, such as '[MASK]'; undefined if there is none. */
  id(piece) {
    if (piece.includes('\0')) return undefined;
    const [at] = this.#place([`${piece}\0`], 0);
    const id = this.#c.mvbert_id(this.#tokenizer, at);
    return id < 0 ? undefined : id;
  }

  /** The ids of a text, with [CLS] and [SEP] unless `special` is false. */
  encode(text, { special = true } = {}) {
    checkText(text);
    const limit = 3 * text.length + 2;  // no byte has two pieces
    const [at, size, ids] = this.#place([text], 4 * limit);
    const count = this.#call(() =>
      this.#c.mvbert_encode(this.#tokenizer, at, size, special ? 1 : 0, ids, limit));
    return new Int32Array(this.#c.memory.buffer, ids, count).slice();
  }

  /** The ids of a text without [CLS] and [SEP]; piece i is text.slice(spans[2 * i], spans[2 * i + 1]). */
  encodeSpans(text) {
    checkText(text);
    const limit = 3 * text.length;
    const [at, size, ids] = this.#place([text], 12 * limit);
    const places = ids + 4 * limit;
    const count = this.#call(() =>
      this.#c.mvbert_encode_spans(this.#tokenizer, at, size, ids, places, limit));
    const spans = new Uint32Array(this.#c.memory.buffer, places, 2 * count).slice();
    if (/[\ud800-\udbff][\udc00-\udfff]/.test(text)) {  // code points, not units of UTF-16
      const starts = [];
      let unit = 0;
      for (const character of text) {
        starts.push(unit);
        unit += character.length;
      }
      starts.push(unit);
      spans.forEach((point, i) => { spans[i] = starts[point]; });
    }
    return { ids: new Int32Array(this.#c.memory.buffer, ids, count).slice(), spans };
  }

  /** Texts, or pairs of texts, as rows padded to one width. */
  encodeBatch(texts, {
    pairs, special = true, maxLength = 0, truncation = 'longest_first', width = 0, multiple = 0,
  } = {}) {
    if (pairs !== undefined && pairs.length !== texts.length) {
      throw new TokenizerError(`there are ${texts.length} texts and ${pairs.length} pairs`, -1);
    }
    if (!Object.hasOwn(TRUNCATIONS, truncation)) {
      throw new TokenizerError(`there is no truncation '${truncation}'`, -1);
    }
    const all = pairs === undefined ? texts : [...texts, ...pairs];
    const placed = this.#place(all, TEXT * all.length + BATCH_OPTIONS + BATCH);
    const list = placed.pop(), given = list + TEXT * all.length, result = given + BATCH_OPTIONS;
    let view = new DataView(this.#c.memory.buffer);
    placed.forEach((value, i) => view.setUint32(list + 4 * i, value, true));
    new Uint8Array(this.#c.memory.buffer, given, BATCH_OPTIONS).fill(0);
    view.setInt32(given, special ? 0 : 1, true);
    view.setInt32(given + 4, TRUNCATIONS[truncation], true);
    [maxLength, width, multiple].forEach((value, i) => {
      if (!Number.isSafeInteger(value)) throw new TypeError('lengths must be whole numbers');
      view.setBigInt64(given + 8 + 8 * i, BigInt(value), true);
    });
    const second = pairs === undefined ? 0 : list + TEXT * texts.length;
    this.#call(() => this.#c.mvbert_encode_batch(
      this.#tokenizer, list, second, texts.length, given, result));
    const buffer = this.#c.memory.buffer;
    view = new DataView(buffer);
    const rows = Number(view.getBigInt64(result, true)), columns = Number(view.getBigInt64(result + 8, true));
    const [inputIds, attentionMask, tokenTypeIds] = [16, 20, 24].map((field) =>
      new BigInt64Array(buffer, view.getUint32(result + field, true), rows * columns).slice());
    this.#c.mvbert_batch_free(result);
    return { inputIds, attentionMask, tokenTypeIds, dims: [rows, columns] };
  }

  #allocate(size) {
    const at = this.#c.malloc(Math.max(size, 1));
    if (at === 0) throw new TokenizerError('out of memory', -6);
    return at >>> 0;
  }

  // Writes texts as UTF-8 and returns the address and size of each, then that of `more` bytes.
  #place(texts, more) {
    let size = 0;
    for (const text of texts) size += 3 * checkText(text).length;
    if (size + more > 2 ** 30) throw new TokenizerError('the texts are too long for one call', -6);
    const needed = size + more + 16;
    if (needed > this.#room) {
      this.#c.free(this.#scratch);
      this.#scratch = this.#room = 0;
      this.#scratch = this.#allocate(needed);
      this.#room = needed;
    }
    const bytes = new Uint8Array(this.#c.memory.buffer);
    const placed = [];
    let at = this.#scratch;
    for (const text of texts) {
      const { written } = encoder.encodeInto(text, bytes.subarray(at, at + 3 * text.length));
      placed.push(at, written);
      at += written;
    }
    placed.push((at + 7) & ~7);
    return placed;
  }

  // The count that a function returns; throws where it is a status.
  #call(work) {
    let count;
    try {
      count = Number(work());
    } catch (error) {
      if (error instanceof WebAssembly.RuntimeError) {
        throw new TokenizerError(`the tokenizer stopped: ${error.message}`, -7);
      }
      throw error;
    }
    if (count < 0) throw new TokenizerError(this.#string(this.#c.mvbert_error_message()), count);
    return count;
  }

  #string(at) {
    const bytes = new Uint8Array(this.#c.memory.buffer);
    return decoder.decode(bytes.subarray(at, bytes.indexOf(0, at)));
  }
}
