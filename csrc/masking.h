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

namespace mvbert {

// What a piece is for masking.
enum PieceKind : std::uint8_t {
  kContinues = 0,  // a word
  kBegins = 1,     // a word
  kSeparates = 2,  // texts; not counted and never masked: [CLS], [SEP]
  kStays = 3,      // a word that counts and is never masked: other special pieces
};

struct MaskingOptions {
  const std::uint8_t* kinds = nullptr;  // [vocabulary], a PieceKind for each id
  std::size_t vocabulary = 0;           // at most 2^32 - 1
  std::int64_t mask = 0;                // the id of [MASK]
  bool by_word = true;                  // whole words up to the budget; else each piece by a coin
  const std::uint32_t* budgets = nullptr;  // [n]: how many pieces of a row of that many to mask
  std::size_t budget_count = 0;            // more than width, if by_word
  std::uint64_t piece_threshold = 0;       // of 2^32, as the following: a piece is masked
  std::uint64_t mask_threshold = 0;        // a masked piece becomes [MASK],
  std::uint64_t other_threshold = 0;       // or, if not below that but below this, any other
  std::uint64_t seed = 0;
  std::uint64_t epoch = 0;
};

// Masks rows [rows, width] in place, of which the first lengths[i] ids are looked at, and writes
// labels of the same shape: the id where a piece is masked, -100 elsewhere. Up to `threads`
// threads.
//
// Throws std::invalid_argument, before a thing is written, if a length is more than width or an id
// of a row is not in the vocabulary.
//
// Cost: the hash, a chain of multiplications, is most of it; rows are hashed four at a time. Random
// numbers come sixteen blocks at a time, and what depends on them is selected, not branched on.
void MaskRows(const MaskingOptions& options, std::size_t rows, std::size_t width,
              const std::int64_t* lengths, int threads, std::int64_t* ids, std::int64_t* labels);

// Writes how many ones each row of an attention mask [rows, width] begins with. False, and
// unfinished lengths, where a row is not ones and then zeros.
bool LengthsOfMask(const std::int64_t* mask, std::size_t rows, std::size_t width,
                   std::int64_t* lengths);

}  // namespace mvbert

#endif  // MVBERT_MASKING_H_
