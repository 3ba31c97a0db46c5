/* Prints the pieces and the ids of a text: encode VOCAB.TXT TEXT. How to build it: docs/c-api.md.
 */

#include <inttypes.h>
#include <mvbert.h>
#include <stdio.h>
#include <string.h>

static int fail(void) {
  fprintf(stderr, "%s\n", mvbert_error_message());
  return 1;
}

int main(int argc, char** argv) {
  mvbert_tokenizer* tokenizer;
  mvbert_batch batch;
  mvbert_batch_options options = {0};
  mvbert_text text;
  int64_t i;
  if (argc != 3) {
    fprintf(stderr, "usage: %s VOCAB.TXT TEXT\n", argv[0]);
    return 2;
  }
  if (mvbert_open(argv[1], NULL, &tokenizer) != MVBERT_OK) return fail();
  text.data = argv[2];
  text.size = strlen(argv[2]);
  options.max_length = 512;
  if (mvbert_encode_batch(tokenizer, &text, NULL, 1, &options, &batch) != MVBERT_OK) return fail();
  for (i = 0; i < batch.width; ++i) {
    printf("%6" PRId64 " %s\n", batch.input_ids[i],
           mvbert_piece(tokenizer, (int32_t)batch.input_ids[i]));
  }
  mvbert_batch_free(&batch);
  mvbert_free(tokenizer);
  return 0;
}
