// Words -> pieces under one vocabulary or two, remembered.
//
// Words are looked up in a table whose 32-byte slot holds a word of up to 16 bytes and its pieces
// under both vocabularies, so a mixed text costs what a plain one does. A word that is not there is
// cut by the tries and remembered. The tables are bounded (8 MiB, and 4 MiB for words of 17 to 48
// bytes); the vocabularies' own words are in from the start. What is in never changes a result.

#ifndef MVBERT_PIECE_CACHE_H_
#define MVBERT_PIECE_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "huge_pages.h"
#include "id_buffer.h"
#include "packed_pieces.h"
#include "wordpiece.h"
#include "words.h"

namespace mvbert {

// For one thread at a time. The vocabularies must outlive it.
class PieceCache {
 public:
  // `student` may be null. Its ids come out with teacher.size() added.
  PieceCache(const WordPiece& teacher, const WordPiece* student);

  // A copy that learns separately.
  explicit PieceCache(const PieceCache& seeds);
  PieceCache& operator=(const PieceCache&) = delete;

  // Appends the pieces of a batch's words to *ids. Texts end after text_ends[i] of the batch's
  // words, ascending; each time the size of *ids goes to *ends. choices[w] is 1 where the student
  // cuts word w, null where it cuts none. Unless `starts` is null, starts[w] becomes the place of
  // word w's first id.
  void Look(const WordBatch& batch, const std::uint8_t* choices,
            const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
            std::vector<std::uint64_t>* ends, std::uint32_t* starts);

  // Time to start again from the seeds: the pieces of words with many have grown to 16 MiB.
  bool overfull() const { return pool_.size() > kPoolLimit; }

 private:
  static constexpr int kBits = 16;
  static constexpr std::size_t kSets = std::size_t{1} << kBits;
  static constexpr std::size_t kWays = 4;
  static constexpr std::size_t kLongest = 48;  // bytes of a word that is remembered

  struct Slot {
    std::uint64_t low, high;  // the word, padded with zeros
    Pieces pieces[2];         // the teacher's, the student's
  };
  // Two cache lines. Words that are met again move to the first, the only one that is prefetched.
  struct alignas(128) Set {
    Slot slots[kWays];
  };
  struct alignas(64) LongSlot {
    char word[kLongest];
    Pieces pieces[2];
  };

  static std::size_t SetOf(std::uint64_t low, std::uint64_t high, std::size_t size);
  static Slot* Find(Set& set, std::uint64_t low, std::uint64_t high);

  template <typename Format, bool kMixed>
  void LookUp(const WordBatch& batch, const std::uint8_t* choices,
              const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
              std::vector<std::uint64_t>* ends, std::uint32_t* word_starts);

  Pieces Pack(const std::int32_t* cut, std::size_t count);
  Pieces Cut(const WordPiece& vocabulary, std::string_view word, std::int32_t base);
  void CutBoth(std::string_view word, Pieces pieces[2]);

  // A word that is not in the first line of its set, brought there.
  const Slot* Further(std::uint32_t place, std::uint64_t low, std::uint64_t high,
                      std::string_view word);

  // Puts a word into the first free slot, or else into one of the second line.
  Slot* Insert(Set* set, std::uint64_t low, std::uint64_t high, std::string_view word);

  // A word of more than 16 bytes. (Scripts with two or three bytes a letter have many.)
  Pieces LongWord(std::string_view word, std::size_t which);

  static constexpr std::uint32_t kNoPlace = 0xFFFFFFFF;
  static constexpr std::size_t kStride = 8;                        // room for each word's ids
  static constexpr std::size_t kPoolLimit = std::size_t{1} << 22;  // ids
  static constexpr std::size_t kMostInPool = std::size_t{1} << 16;

  const WordPiece& teacher_;
  const WordPiece* student_;
  const bool narrow_;  // how pieces are packed
  std::vector<std::int32_t> cut_;
  std::vector<std::int32_t> pool_;
  ZeroedTable<Set> sets_;
  std::size_t next_victim_ = 0;
  std::unique_ptr<ZeroedTable<LongSlot>> long_;
};

}  // namespace mvbert

#endif  // MVBERT_PIECE_CACHE_H_
