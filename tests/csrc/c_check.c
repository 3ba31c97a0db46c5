/* The C interface, from C: ids, spans, rows, and every refusal by its status and words. Exit status
 * 0 if all is well. (That its ids are Python's is tests/csrc/test_c_library.py.) */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mvbert.h"

#define VOCAB "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nwor\n##ld\n!\ncaf\xC3\xA9\ncafe\n"

enum { kPad, kUnk, kCls, kSep, kMask, kHello, kWor, kLd, kMark, kAccent, kCafe };

static int failures = 0;

static void require(int good, const char* what) {
  if (good) return;
  fprintf(stderr, "c_check: %s (last error: %s)\n", what, mvbert_error_message());
  ++failures;
}

/* The status must be this one and its message have these words. */
static void refused(int64_t found, int status, const char* words) {
  if (found == status && strstr(mvbert_error_message(), words) != NULL) return;
  fprintf(stderr, "c_check: expected status %d and '%s', got %ld and '%s'\n", status, words,
          (long)found, mvbert_error_message());
  ++failures;
}

static mvbert_tokenizer* make(const mvbert_options* options) {
  mvbert_tokenizer* tokenizer = NULL;
  require(mvbert_from_memory(VOCAB, strlen(VOCAB), options, &tokenizer) == MVBERT_OK,
          "no tokenizer");
  return tokenizer;
}

static int same(const int64_t* found, int64_t count, const int* expected, int64_t wanted) {
  int64_t i;
  if (count != wanted) return 0;
  for (i = 0; i < count; ++i) {
    if (found[i] != expected[i]) return 0;
  }
  return 1;
}

/* The ids of a text must be these. */
static void encodes(const mvbert_tokenizer* tokenizer, const char* text, int special,
                    const int* expected, int64_t wanted) {
  int32_t ids[32];
  int64_t wide[32];
  int64_t i, count = mvbert_encode(tokenizer, text, strlen(text), special, ids, 32);
  for (i = 0; i < count && i < 32; ++i) wide[i] = ids[i];
  require(same(wide, count, expected, wanted), text);
}

static void check_texts(void) {
  mvbert_tokenizer* tokenizer = make(NULL);
  int32_t ids[4] = {-7, -7, -7, -7};
  uint32_t spans[12];
  int32_t pieces[6];
  const char* text = "Cafe\xCC\x81 worldx [MASK]";
  const int plain[] = {kCls, kHello, kWor, kLd, kMark, kSep};
  const int wanted[] = {kCafe, kUnk, kMask};
  encodes(tokenizer, "Hello WORLD!", 1, plain, 6);
  encodes(tokenizer, "Hello WORLD!", 0, plain + 1, 4);
  encodes(tokenizer, "", 0, plain, 0);
  encodes(tokenizer, text, 0, wanted, 3);
  require(mvbert_encode(tokenizer, "Hello WORLD!", 12, 1, ids, 3) == 6 && ids[2] == kWor &&
              ids[3] == -7,
          "more ids than there is room for");
  require(mvbert_encode(tokenizer, "Hello", 5, 1, NULL, 0) == 3, "a count alone");
  require(mvbert_encode(tokenizer, NULL, 0, 1, NULL, 0) == 2, "a null text of no bytes");
  require(mvbert_encode_spans(tokenizer, text, strlen(text), pieces, spans, 6) == 3, "spans");
  require(pieces[0] == kCafe && spans[0] == 0 && spans[1] == 4 && spans[2] == 6 && spans[3] == 12 &&
              spans[4] == 13 && spans[5] == 19,
          "spans are not in code points");
  require(mvbert_size(tokenizer) == 11 && mvbert_id(tokenizer, "##ld") == kLd &&
              mvbert_id(tokenizer, "zebra") < 0 && mvbert_id(tokenizer, "") < 0,
          "wrong ids of pieces");
  require(strcmp(mvbert_piece(tokenizer, kLd), "##ld") == 0 &&
              mvbert_piece(tokenizer, 11) == NULL && mvbert_piece(tokenizer, -1) == NULL,
          "wrong pieces of ids");
  refused(mvbert_encode(tokenizer, "a\xFFz", 3, 1, ids, 4), MVBERT_ERROR_TEXT,
          "the text is not UTF-8: byte 0xff at offset 1");
  refused(mvbert_encode_spans(tokenizer, "\xED\xA0\x80", 3, ids, spans, 4), MVBERT_ERROR_TEXT,
          "offset 0");
  refused(mvbert_encode(NULL, "a", 1, 1, ids, 4), MVBERT_ERROR_ARGUMENT, "tokenizer");
  refused(mvbert_encode(tokenizer, NULL, 1, 1, ids, 4), MVBERT_ERROR_ARGUMENT, "text");
  refused(mvbert_encode(tokenizer, "a", 1, 1, NULL, 4), MVBERT_ERROR_ARGUMENT, "ids");
  refused(mvbert_encode_spans(tokenizer, "a", 1, ids, NULL, 4), MVBERT_ERROR_ARGUMENT, "spans");
  mvbert_free(tokenizer);
  mvbert_free(NULL);
}

static void check_options(void) {
  const mvbert_added_piece added[] = {{"<New>", 11, 1}, {"Cafe!", 12, 0}, {"hello", kHello, 0}};
  mvbert_options options;
  mvbert_tokenizer* tokenizer;
  const int cased[] = {kUnk, kWor}, accented[] = {kAccent},
            pieces[] = {11, kUnk, 12, kHello, kHello};
  memset(&options, 0, sizeof options);
  options.cased = 1;
  tokenizer = make(&options);
  encodes(tokenizer, "Hello wor", 0, cased, 2);
  mvbert_free(tokenizer);
  options.cased = 0;
  options.keep_accents = 1;
  tokenizer = make(&options);
  encodes(tokenizer, "CAF\xC3\x89", 0, accented, 1);
  mvbert_free(tokenizer);
  options.keep_accents = 0;
  options.added = added;
  options.added_count = 3;
  tokenizer = make(&options);
  require(mvbert_size(tokenizer) == 13 && mvbert_id(tokenizer, "Cafe!") == 12, "added ids");
  encodes(tokenizer, "<NEW>xCafe!hellohello", 0, pieces, 5);
  mvbert_free(tokenizer);
}

static void refuses(const char* vocab, size_t size, const mvbert_options* options, int status,
                    const char* words) {
  mvbert_tokenizer* tokenizer = (mvbert_tokenizer*)&failures;
  refused(mvbert_from_memory(vocab, size, options, &tokenizer), status, words);
  require(tokenizer == NULL, "a tokenizer in spite of an error");
}

static void refuses_piece(const char* piece, int32_t id, int status, const char* words) {
  mvbert_added_piece added = {NULL, 0, 0};
  mvbert_options options;
  memset(&options, 0, sizeof options);
  added.piece = piece;
  added.id = id;
  options.added = &added;
  options.added_count = 1;
  refuses(VOCAB, strlen(VOCAB), &options, status, words);
}

static void check_vocabularies(void) {
  mvbert_tokenizer* tokenizer;
  mvbert_options options;
  refuses("", 0, NULL, MVBERT_ERROR_VOCAB, "is empty; expected a vocab.txt");
  refuses("a\0b", 3, NULL, MVBERT_ERROR_VOCAB, "binary (NUL at byte 1)");
  refuses("\xEF\xBB\xBF" VOCAB, 8, NULL, MVBERT_ERROR_VOCAB, "byte order mark");
  refuses("a\n\xC3\n", 4, NULL, MVBERT_ERROR_VOCAB, "not UTF-8 (at byte 2)");
  refuses("[PAD]\n[UNK]\na", 13, NULL, MVBERT_ERROR_VOCAB, "has no [CLS], [SEP]; expected");
  refuses(VOCAB "wor\n", strlen(VOCAB) + 4, NULL, MVBERT_ERROR_VOCAB,
          "'wor' appears twice, with ids 6 and 11");
  refuses(NULL, 4, NULL, MVBERT_ERROR_ARGUMENT, "null");
  refused(mvbert_from_memory(VOCAB, 4, NULL, NULL), MVBERT_ERROR_ARGUMENT, "null");
  refuses_piece("x", 12, MVBERT_ERROR_VOCAB, "id 12, which is neither");
  refuses_piece("x", -1, MVBERT_ERROR_VOCAB, "id -1");
  refuses_piece("x", 3, MVBERT_ERROR_VOCAB, "id 3, which is that of the piece '[SEP]'");
  refuses_piece("wor", 11, MVBERT_ERROR_VOCAB, "appears twice");
  refuses_piece("a\xE3\x80\x80z", 11, MVBERT_ERROR_VOCAB, "white space");
  refuses_piece("", 11, MVBERT_ERROR_VOCAB, "empty");
  refuses_piece("\xFF", 11, MVBERT_ERROR_TEXT, "not UTF-8");
  refuses_piece(NULL, 11, MVBERT_ERROR_ARGUMENT, "null");
  memset(&options, 0, sizeof options);
  options.added_count = 1;
  refuses(VOCAB, strlen(VOCAB), &options, MVBERT_ERROR_ARGUMENT, "null");
  options.added_count = 0;
  options.reserved[7] = 1;
  refuses(VOCAB, strlen(VOCAB), &options, MVBERT_ERROR_ARGUMENT, "reserved");
  refused(mvbert_open("no/such/vocab.txt", NULL, &tokenizer), MVBERT_ERROR_FILE,
          "cannot read no/such/vocab.txt: ");
  refused(mvbert_open("/", NULL, &tokenizer), MVBERT_ERROR_FILE, "cannot read /: ");
  refused(mvbert_open(NULL, NULL, &tokenizer), MVBERT_ERROR_ARGUMENT, "null");
  /* Line ends of any kind, none at the end, blank lines, which are ids that never come out. */
  require(
      mvbert_from_memory("[PAD]\r\n[UNK]\r[CLS]\n\n[SEP]\n\na", 28, NULL, &tokenizer) == MVBERT_OK,
      "line ends");
  require(mvbert_size(tokenizer) == 7 && mvbert_id(tokenizer, "a") == 6 &&
              mvbert_piece(tokenizer, 3)[0] == '\0',
          "ids after line ends");
  mvbert_free(tokenizer);
}

static void check_batches(void) {
  mvbert_tokenizer* tokenizer = make(NULL);
  mvbert_text texts[] = {{"hello world", 11}, {NULL, 0}, {"!", 1}},
              broken[] = {{"a", 1}, {"\x80", 1}};
  mvbert_batch_options options;
  mvbert_batch batch;
  const int ids[] = {kCls, kHello, kWor, kLd,   kSep, kCls, kSep, kPad,
                     kPad, kPad,   kCls, kMark, kSep, kPad, kPad};
  const int mask[] = {1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0};
  const int pair[] = {kCls, kHello, kWor, kSep, kMark, kSep, kPad, kPad};
  const int types[] = {0, 0, 0, 0, 1, 1, 0, 0};
  require(mvbert_encode_batch(tokenizer, texts, NULL, 3, NULL, &batch) == MVBERT_OK, "a batch");
  require(batch.rows == 3 && batch.width == 5 && same(batch.input_ids, 15, ids, 15) &&
              same(batch.attention_mask, 15, mask, 15) && batch.token_type_ids[14] == 0,
          "a batch's arrays");
  mvbert_batch_free(&batch);
  require(batch.input_ids == NULL && batch.rows == 0, "a freed batch is not zeroed");
  mvbert_batch_free(&batch);
  mvbert_batch_free(NULL);
  memset(&options, 0, sizeof options);
  options.max_length = 6;
  options.multiple = 4;
  options.threads = 3;
  require(mvbert_encode_batch(tokenizer, texts, texts + 2, 1, &options, &batch) == MVBERT_OK,
          "a pair");
  require(batch.width == 8 && same(batch.input_ids, 8, pair, 8) &&
              same(batch.token_type_ids, 8, types, 8),
          "a pair's arrays");
  mvbert_batch_free(&batch);
  require(mvbert_encode_batch(tokenizer, NULL, NULL, 0, NULL, &batch) == MVBERT_OK, "no texts");
  require(batch.rows == 0 && batch.width == 0, "the shape of no texts");
  mvbert_batch_free(&batch);
  refused(mvbert_encode_batch(tokenizer, broken, NULL, 2, NULL, &batch), MVBERT_ERROR_TEXT,
          "text 1 is not UTF-8");
  refused(mvbert_encode_batch(tokenizer, texts, broken, 2, NULL, &batch), MVBERT_ERROR_TEXT,
          "pair 1 is not UTF-8");
  require(batch.input_ids == NULL, "a batch in spite of an error");
  options.max_length = 1;
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, &options, &batch), MVBERT_ERROR_LENGTH,
          "no room");
  options.max_length = 5;
  options.truncation = MVBERT_ONLY_SECOND;
  refused(mvbert_encode_batch(tokenizer, texts, texts + 2, 1, &options, &batch),
          MVBERT_ERROR_LENGTH, "cannot be cut");
  options.truncation = 3;
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, &options, &batch), MVBERT_ERROR_ARGUMENT,
          "no such truncation");
  memset(&options, 0, sizeof options);
  options.width = 4;
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, &options, &batch), MVBERT_ERROR_LENGTH,
          "the longest row has 5 pieces, more than the width 4");
  options.width = 1;
  options.width <<= 40;
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, &options, &batch), MVBERT_ERROR_ARGUMENT,
          "below 2^31");
  options.width = -1;
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, &options, &batch), MVBERT_ERROR_ARGUMENT,
          "negative");
  refused(mvbert_encode_batch(tokenizer, NULL, NULL, 1, NULL, &batch), MVBERT_ERROR_ARGUMENT,
          "texts");
  refused(mvbert_encode_batch(tokenizer, texts, NULL, 1, NULL, NULL), MVBERT_ERROR_ARGUMENT,
          "batch");
  mvbert_free(tokenizer);
}

int main(void) {
  require(mvbert_error_message()[0] == '\0', "an error before the first");
  require(mvbert_api_version() == MVBERT_API_VERSION, "another version than the header's");
  require(strchr(mvbert_version(), '.') != NULL, "no release");
  check_texts();
  check_options();
  check_vocabularies();
  check_batches();
  if (failures == 0) puts("c_check: all is well");
  return failures != 0;
}
