/** What a text, a vocabulary or an option is refused for. */
export class TokenizerError extends Error {
  /** An mvbert_status of csrc/mvbert.h. */
  readonly status: number;
}

/** A piece that is looked for in text before the text is split into words. */
export interface AddedPiece {
  piece: string;
  /** Its line of the vocab.txt, counted from 0, or the next after its end. */
  id: number;
  /** Whether it is looked for in normalised text: in any case where text is lower-cased. */
  normalized?: boolean;
}

export interface TokenizerOptions {
  /** Text keeps its case and accents: "do_lower_case" is false. */
  cased?: boolean;
  /** Lower-cased text keeps its accents: "strip_accents" is false. */
  keepAccents?: boolean;
  added?: AddedPiece[];
}

export interface LoadOptions extends TokenizerOptions {
  /** The module: its address (default: tokenizer.wasm beside this file), bytes, or compiled. */
  wasm?: string | URL | BufferSource | WebAssembly.Module;
  /** A vocab.txt. */
  vocab: string | BufferSource;
}

export interface BatchOptions {
  /** The second text of each row. */
  pairs?: string[];
  /** Whether [CLS] comes first and [SEP] after each text; default true. */
  special?: boolean;
  /** Rows are cut to this many pieces; 0, the default: not at all. */
  maxLength?: number;
  truncation?: 'longest_first' | 'only_first' | 'only_second';
  /** Rows are padded to this many pieces; 0, the default: to the longest row. */
  width?: number;
  /** The width is rounded up to a multiple of this. */
  multiple?: number;
}

/** Rows padded to one width, row after row, as onnxruntime-web's Tensor takes them. */
export interface Batch {
  inputIds: BigInt64Array;
  /** 1n, or 0n where padded. */
  attentionMask: BigInt64Array;
  /** 1n in the second text of a pair and its [SEP]. */
  tokenTypeIds: BigInt64Array;
  /** Rows and width. */
  dims: [number, number];
}

/** BERT's tokenizer, with the ids of Hugging Face's slow BertTokenizer. */
export class Tokenizer {
  static load(options: LoadOptions): Promise<Tokenizer>;
  constructor(instance: WebAssembly.Instance, vocab: string | BufferSource, options?: TokenizerOptions);
  /** How many ids there are. */
  readonly size: number;
  /** The piece of an id; undefined if there is none. */
  piece(id: number): string | undefined;
  /** The id of a piece, such as '[MASK]'; undefined if there is none. */
  id(piece: string): number | undefined;
  /** The ids of a text, with [CLS] and [SEP] unless `special` is false. */
  encode(text: string, options?: { special?: boolean }): Int32Array;
  /** The ids of a text without [CLS] and [SEP]; piece i is text.slice(spans[2 * i], spans[2 * i + 1]). */
  encodeSpans(text: string): { ids: Int32Array; spans: Uint32Array };
  /** Texts, or pairs of texts, as rows padded to one width. */
  encodeBatch(texts: string[], options?: BatchOptions): Batch;
}
