// Word stream + segmentations + counter-based coin -> training rows, whole-word masks, labels.
//
// mvbert/text/row_reference.py defines a row in plain Python; this is the same, bit for bit,
// faster. What each random number (philox.h) decides:
//
//   purpose        number            decides
//   kEpochOffset   word 0, block 0   the epoch's shift of all row starts, in [0, stride)
//   kRowOrder      word 0            one round of the Feistel network that orders the rows
//   kVocabulary    0                 the vocabulary of [CLS]
//                  1 ... T - 2       the vocabulary of word or [SEP] 1, 2, ... of the row
//                  T - 2             the vocabulary of the drawn [SEP] (then no word has this
//                  number) T - 1             the vocabulary of the last [SEP]
//   kRow           0                 whether a second [SEP] is drawn
//                  1                 its place
//                  2 + 2 k           step k of the shuffle that orders words for masking
//                  3 + 2 j           masked piece j: [MASK], another piece (and which), or kept
//
// Number i of a row's purpose is word (i / 16) % 4 of block 16 * (i / 64) + i % 16: sixteen blocks
// are made at a time, and their words lie in memory as vector registers hold them.
//
// Cost: 61 instructions a piece with AVX2 (callgrind, T = 128, text like English), a third of them
// for the words, a quarter for Philox. What makes it so little:
//  - A record of 16 bytes holds up to three pieces of a word inline and their count, the two
//    vocabularies' records side by side: a word costs one cache line, one 16-byte copy (whatever
//    its length) and one addition. The coin is part of the record's address, not a branch.
//  - Words are masked in the order of a Fisher-Yates shuffle, of which only the first steps are
//    made (about 17 of 100 words): no priorities to draw, nothing to sort.
//  - Records of the next row and stream words of the row after are prefetched.
//
// There is no floating-point number here: probabilities arrive as integers.

#ifndef MVBERT_MIXER_H_
#define MVBERT_MIXER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mvbert {

// One vocabulary and the pieces of every word of a lexicon in it. Only the PieceTable's constructor
// reads the pointers.
struct Segments {
  const std::uint32_t* ends = nullptr;  // [words], end of each word's pieces in `ids`
  const std::int32_t* ids = nullptr;    // [ends[words - 1]]
  std::size_t words = 0;
  std::size_t pieces = 0;  // length of `ids`
  std::int32_t size = 0;   // of the vocabulary
  std::int32_t cls = 0;
  std::int32_t sep = 0;
  std::int32_t mask = 0;
  std::vector<std::int32_t> special;  // ids never drawn as replacement; any order, repeats allowed
};

// The pieces of every word under one or two vocabularies, laid out for gathering. Immutable once
// made, so safe to share between threads. 16 bytes a word and vocabulary, and 4 a piece of words of
// more than three pieces.
class PieceTable {
 public:
  // Ids of `teacher` keep their value, those of `student` follow after teacher->size (or keep their
  // value without a teacher). One of the two may be null.
  //
  // Throws std::invalid_argument if the two do not have the same words, if a word other than 0 has
  // no pieces, or if an id is outside its vocabulary.
  PieceTable(const Segments* teacher, const Segments* student);

  PieceTable(const PieceTable&) = delete;
  PieceTable& operator=(const PieceTable&) = delete;

  std::size_t words() const { return words_; }

  // Number of vocabularies, 1 or 2.
  int sides() const { return static_cast<int>(sides_.size()); }

 private:
  friend class Mixer;
  friend struct StreamTotals;

  static constexpr std::uint32_t kInline = 3;
  static constexpr std::uint32_t kMark = 0xFFFFFFFFu;  // `count` of word 0, the end of a document

  struct alignas(16) Record {
    std::int32_t ids[kInline];  // of a longer word: ids[0] is its first place in `long_ids_`
    std::uint32_t count;
  };

  struct Side {
    std::int32_t base;
    std::int32_t cls, sep, mask;        // joint ids
    std::vector<std::int32_t> special;  // sorted, distinct, without `base`
    std::uint32_t ordinary;             // ids that are not special
  };

  std::size_t words_ = 0;
  std::vector<Side> sides_;
  std::vector<Record> records_;  // [words, sides]
  std::vector<std::int32_t> long_ids_;
};

// What a stream of word ids adds up to.
struct StreamTotals {
  std::uint64_t marks = 0;  // entries that are 0
  std::uint64_t pieces[2] =
      {};  // by vocabulary (only [0] if there is one); a mark counts one piece

  // Reads the stream once with up to `threads` >= 1 threads. Throws std::invalid_argument naming
  // the first entry that is not below table.words().
  static StreamTotals Of(const PieceTable& table, const std::uint32_t* stream, std::size_t size,
                         int threads);
};

struct MixerOptions {
  std::uint64_t seed = 0;
  std::uint32_t T = 128;               // pieces a row, 8 ... 65535
  std::uint32_t stride = 1;            // words from one row start to the next, 1 ... stream size
  std::uint64_t pair_threshold = 0;    // of 2^32
  std::uint32_t capacity = 0;          // M, masked pieces a row has room for, 0 ... T
  std::vector<std::uint32_t> budgets;  // [T - 1]: how many of n word pieces to mask, 0 ... M
};

// Makes rows. Immutable, so one Mixer may be read from many threads. Does not own the table or the
// stream: both must outlive it, and the stream must not change and must have been through
// StreamTotals::Of with this table without an exception.
//
// Every loop ends: a word has a piece at least, and there is a word in the stream, so a row of T
// pieces is full after T passes over the stream at most; a row's place is sought by walking a cycle
// of a permutation, which comes back.
class Mixer {
 public:
  // Where `count` rows go, each array in C order.
  struct Rows {
    std::int32_t* input_ids;         // [count, T]
    std::uint8_t* token_type_ids;    // [count, T]
    std::int32_t* masked_positions;  // [count, M], ascending; unused: 0
    std::int32_t* labels;            // [count, M]; unused: -100
  };

  // Throws std::invalid_argument if an option is outside its range or the stream has no word.
  Mixer(const PieceTable& table, const std::uint32_t* stream, std::size_t stream_size,
        MixerOptions options);

  Mixer(const Mixer&) = delete;
  Mixer& operator=(const Mixer&) = delete;

  std::uint64_t rows_per_epoch() const { return rows_; }
  const MixerOptions& options() const { return options_; }

  // Writes rows [start, start + count), which must not wrap around 2^64. A word's vocabulary is the
  // student's where 32 random bits are below `student_threshold` (of 2^32; nothing to choose with
  // one vocabulary). Uses up to `threads` >= 1 threads, fewer for few rows; the result does not
  // depend on it. Starts and joins its threads within the call, so it is safe after fork.
  void Read(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold, int threads,
            Rows out) const;

  // Offset in the stream of the first word of each row [start, start + count).
  void Starts(std::uint64_t start, std::size_t count, std::uint64_t* first) const;

 private:
  class Scratch;

  template <bool kTwo>
  void ReadRange(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold,
                 Rows out) const;

  const PieceTable& table_;
  const std::uint32_t* stream_;
  std::size_t stream_size_;
  MixerOptions options_;
  std::uint64_t rows_;
  std::uint32_t side_[2];  // the least whose product is not below rows_, nearly equal
};

}  // namespace mvbert

#endif  // MVBERT_MIXER_H_
