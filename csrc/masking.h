// Rows of ids -> masked rows and labels, for masked language modelling on anybody's rows.
//
// mvbert/text/masking.py defines it in plain Python; this is the same, bit for bit. A row's numbers
// are those of Purpose::kMasking for the hash of its ids and the epoch, first to last: they depend
// on nothing but the row, the seed and the epoch, so it does not matter who masks it and when.
//
// Every loop ends: each runs once over the rows, a row's ids, or its words, which are no more.

#ifndef MVBERT_MASKING_H_
#define MVBERT_MASKING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mvbert {

// What a piece is for masking.
enum PieceKind : std::uint8_t {
  kContinues = 0,  // a word
  kBegins = 1,     // a word
  kSeparates = 2,  // texts; not counted and never masked: [CLS], [SEP]
  kStays = 3,      // a word that counts and is never masked: other special pieces
};

struct MaskingOptions {
  std::vector<std::uint8_t> kinds;     // by id
  std::int64_t mask = 0;               // the id of [MASK]
  bool by_word = true;                 // whole words up to the budget; else each piece by a coin
  std::vector<std::uint32_t> budgets;  // how many pieces of a row of n to mask, for n up to width
  std::uint64_t piece_threshold = 0;   // of 2^32, as the following: a piece is masked
  std::uint64_t mask_threshold = 0;    // a masked piece becomes [MASK],
  std::uint64_t other_threshold = 0;   // or, if not below that but below this, any other
  std::uint64_t seed = 0;
  std::uint64_t epoch = 0;
};

// Masks rows [rows, width] in place, of which the first lengths[i] ids are looked at, and writes
// labels of the same shape: the id where a piece is masked, -100 elsewhere. Up to `threads`
// threads.
//
// Throws std::invalid_argument, before a thing is written, if a length is more than width or an id
// of a row is not in the vocabulary.
void MaskRows(const MaskingOptions& options, std::size_t rows, std::size_t width,
              const std::int64_t* lengths, int threads, std::int64_t* ids, std::int64_t* labels);

}  // namespace mvbert

#endif  // MVBERT_MASKING_H_
