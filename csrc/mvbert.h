/* The tokenizer for other languages: a C interface.
 *
 * mvbert_open reads a vocab.txt; mvbert_encode turns a text into ids, mvbert_encode_batch several
 * texts into padded rows for a model. The ids are those of Hugging Face's slow BertTokenizer.
 * docs/c-api.md shows calls from C, Swift, Kotlin, C# and Dart.
 *
 * Errors: functions that can fail return a negative mvbert_status, and mvbert_error_message() then
 * says what was expected and what came. No C++ exception leaves a function.
 *
 * Threads: any number may use one tokenizer. A batch belongs to the caller.
 *
 * Structures: zero in a field is its default, so a zeroed structure is a valid one, and a null
 * pointer to options means all defaults. Fields named `reserved` must be zero.
 */

#ifndef MVBERT_MVBERT_H_
#define MVBERT_MVBERT_H_

#include <stddef.h>
#include <stdint.h>

#if defined(MVBERT_BUILD) && defined(_WIN32)
#define MVBERT_API __declspec(dllexport)
#elif defined(MVBERT_BUILD)
#define MVBERT_API __attribute__((visibility("default")))
#else
#define MVBERT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a program that was compiled with an older header would break. */
#define MVBERT_API_VERSION 1

/* The MVBERT_API_VERSION of the library, and its release, such as "0.1.0". */
MVBERT_API int mvbert_api_version(void);
MVBERT_API const char* mvbert_version(void);

typedef enum mvbert_status {
  MVBERT_OK = 0,
  MVBERT_ERROR_ARGUMENT = -1, /* a null pointer, an option that does not exist */
  MVBERT_ERROR_FILE = -2,     /* the vocabulary cannot be read */
  MVBERT_ERROR_VOCAB = -3,    /* what was read is no vocabulary */
  MVBERT_ERROR_TEXT = -4,     /* a text is not UTF-8 */
  MVBERT_ERROR_LENGTH = -5,   /* a row does not fit into its length */
  MVBERT_ERROR_MEMORY = -6,   /* out of memory */
  MVBERT_ERROR_INTERNAL = -7  /* a defect of the library */
} mvbert_status;

/* What the last failed call of this thread did not accept: a sentence, valid until the next call
 * that fails on this thread. Empty before the first. */
MVBERT_API const char* mvbert_error_message(void);

/* ---- making a tokenizer ---------------------------------------------------------------------- */

typedef struct mvbert_tokenizer mvbert_tokenizer;

/* A piece besides [PAD], [UNK], [CLS], [SEP] and [MASK] that is looked for in text before the text
 * is split into words: one of "added_tokens" in a tokenizer.json. */
typedef struct mvbert_added_piece {
  const char* piece;  /* its text, ending with NUL, without white space */
  int32_t id;         /* its place in the vocab.txt, or after its end */
  int32_t normalized; /* looked for in normalised text: where text is lower-cased, in any case */
} mvbert_added_piece;

typedef struct mvbert_options {
  int32_t cased;        /* text keeps its case and accents ("do_lower_case": false) */
  int32_t keep_accents; /* lower-cased text keeps its accents ("strip_accents": false) */
  const mvbert_added_piece* added;
  size_t added_count;
  int32_t reserved[8];
} mvbert_options;

/* Makes a tokenizer from a vocab.txt: UTF-8, a piece a line. Give it to mvbert_free. The memory of
 * a vocabulary may go as soon as the call returns. On an error *tokenizer is null. */
MVBERT_API int mvbert_open(const char* path, const mvbert_options* options,
                           mvbert_tokenizer** tokenizer);
MVBERT_API int mvbert_from_memory(const char* vocab, size_t size, const mvbert_options* options,
                                  mvbert_tokenizer** tokenizer);

/* Null is allowed. */
MVBERT_API void mvbert_free(mvbert_tokenizer* tokenizer);

/* ---- its vocabulary -------------------------------------------------------------------------- */

/* How many ids there are. */
MVBERT_API int32_t mvbert_size(const mvbert_tokenizer* tokenizer);

/* The piece of an id, ending with NUL, valid while the tokenizer lives; null if there is none. */
MVBERT_API const char* mvbert_piece(const mvbert_tokenizer* tokenizer, int32_t id);

/* The id of a piece, such as "[MASK]"; negative if there is none. Looks at every piece. */
MVBERT_API int32_t mvbert_id(const mvbert_tokenizer* tokenizer, const char* piece);

/* ---- one text -------------------------------------------------------------------------------- */

/* Writes the ids of a text of `size` bytes of UTF-8, the first `capacity` of them, and returns how
 * many it has, or a negative mvbert_status. `special` is whether [CLS] comes first and [SEP] last.
 * `ids` may be null if capacity is 0. */
MVBERT_API int64_t mvbert_encode(const mvbert_tokenizer* tokenizer, const char* text, size_t size,
                                 int32_t special, int32_t* ids, size_t capacity);

/* The same without [CLS] and [SEP], and where each piece lies in the text: piece i has its letters
 * in the code points [spans[2 * i], spans[2 * i + 1]). */
MVBERT_API int64_t mvbert_encode_spans(const mvbert_tokenizer* tokenizer, const char* text,
                                       size_t size, int32_t* ids, uint32_t* spans, size_t capacity);

/* ---- many texts ------------------------------------------------------------------------------ */

typedef struct mvbert_text {
  const char* data; /* UTF-8; may be null if size is 0 */
  size_t size;      /* bytes */
} mvbert_text;

typedef enum mvbert_truncation {
  MVBERT_LONGEST_FIRST = 0, /* from the longer text of a pair */
  MVBERT_ONLY_FIRST = 1,
  MVBERT_ONLY_SECOND = 2
} mvbert_truncation;

typedef struct mvbert_batch_options {
  int32_t without_special; /* no [CLS] and [SEP] */
  int32_t truncation;      /* an mvbert_truncation: how rows are cut to max_length */
  int64_t max_length;      /* of a row in pieces, special ones counted; 0: rows are not cut */
  int64_t width;           /* pad rows to this many pieces; 0: to the longest row */
  int64_t multiple;        /* round the width up to a multiple of this; 0: as it is */
  int32_t threads;         /* at most; 0: one */
  int32_t reserved[7];
} mvbert_batch_options;

/* Rows padded to one width, each array [rows, width], row after row. */
typedef struct mvbert_batch {
  int64_t rows;
  int64_t width;
  int64_t* input_ids;
  int64_t* attention_mask; /* 1, or 0 where padded */
  int64_t* token_type_ids; /* 1 in the second text of a pair and its [SEP] */
} mvbert_batch;

/* Row i is texts[i] and, unless `pairs` is null, pairs[i]. Fills *batch, which need not be set
 * before; give it to mvbert_batch_free. On an error *batch is zeroed. */
MVBERT_API int mvbert_encode_batch(const mvbert_tokenizer* tokenizer, const mvbert_text* texts,
                                   const mvbert_text* pairs, size_t count,
                                   const mvbert_batch_options* options, mvbert_batch* batch);

/* Frees the arrays and zeroes *batch. Null and a zeroed batch are allowed. */
MVBERT_API void mvbert_batch_free(mvbert_batch* batch);

#ifdef __cplusplus
}
#endif

#endif /* MVBERT_MVBERT_H_ */
