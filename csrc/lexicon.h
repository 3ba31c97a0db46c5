// The lexicon: every distinct word once, with a number and a count.
//
// Interning copies the bytes of a word that is met for the first time into one growing buffer and
// costs one probe of a hash table otherwise (20-100 ns, mostly the cache miss). Memory is about
// 50 bytes a distinct word and does not depend on the length of the text.

#ifndef MVBERT_LEXICON_H_
#define MVBERT_LEXICON_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace mvbert {

// The empty word, id 0, ends a document in a word stream.
inline constexpr std::uint32_t kDocumentMark = 0;

// WordPiece turns every word of more than 100 code points into [UNK], so longer ones are kept cut
// to 101: still over the limit, and the lexicon stays small.
inline constexpr std::size_t kMaxStoredCodePoints = 101;

namespace internal {

inline constexpr std::uint64_t kOdd0 = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
inline constexpr std::uint64_t kOdd1 = 0xC2B2AE3D27D4EB4Fu;  // a prime of xxHash64

// Both halves of a 128-bit product, folded: the mixing step of wyhash (Wang Yi, 2019).
inline std::uint64_t Fold(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

}  // namespace internal

// The first kMaxStoredCodePoints code points of a word of valid UTF-8.
std::string_view CutWord(std::string_view word);

// A 64-bit hash of a word's bytes; the same on every machine of the same byte order.
std::uint64_t HashWord(std::string_view word);

// A word of at most 16 bytes as two numbers, padded with zeros. 16 bytes must be readable at
// `bytes`.
inline void ShortWord(const char* bytes, std::size_t size, std::uint64_t* low,
                      std::uint64_t* high) {
  static constexpr unsigned char kKeep[32] = {255, 255, 255, 255, 255, 255, 255, 255, 255,
                                              255, 255, 255, 255, 255, 255, 255, 0};
  std::uint64_t keep_low, keep_high;
  std::memcpy(&keep_low, kKeep + 16 - size, 8);
  std::memcpy(&keep_high, kKeep + 24 - size, 8);
  std::memcpy(low, bytes, 8);
  std::memcpy(high, bytes + 8, 8);
  *low &= keep_low;
  *high &= keep_high;
}

// HashWord of the same word.
inline std::uint64_t HashShortWord(std::uint64_t low, std::uint64_t high, std::size_t size) {
  return internal::Fold(low ^ internal::kOdd0, high ^ internal::kOdd1 ^ size) * internal::kOdd0;
}

// Not thread-safe; several threads may read at once while none interns.
class Lexicon {
 public:
  // Holds the empty word only.
  Lexicon();
  Lexicon(const Lexicon&) = delete;
  Lexicon& operator=(const Lexicon&) = delete;

  // The id of a word of at most kMaxStoredCodePoints code points: the old one or the next free one.
  // `hash` must be HashWord(word). Half of the slots at least are free, so a search ends. Throws
  // std::length_error when 2^32 - 2 words are in.
  std::uint32_t Intern(std::string_view word, std::uint64_t hash);

  // Adds to the count of a word that is in. Precondition: id < size().
  void Count(std::uint32_t id, std::uint64_t times) { counts_[id] += times; }

  // Counts every word of a stream once more, or once less. Throws std::invalid_argument naming the
  // first id that is not in, or whose count is 0 already.
  void CountStream(const std::uint32_t* ids, std::size_t size);
  void UncountStream(const std::uint32_t* ids, std::size_t size);

  // Brings the place of a hash towards the cache, for an Intern that follows soon.
  void Prefetch(std::uint64_t hash) const;

  std::size_t size() const { return ends_.size(); }
  std::string_view word(std::uint32_t id) const {
    const std::uint64_t begin = id == 0 ? 0 : ends_[id - 1];
    return std::string_view(bytes_).substr(begin, ends_[id] - begin);
  }
  std::uint64_t count(std::uint32_t id) const { return counts_[id]; }

  // The words from id `first` on, each followed by a line break.
  std::string Lines(std::uint32_t first) const;

  // The ids in their final order: the document mark, then by (count, high to low; bytes, low to
  // high). The result does not depend on the order in which words came in.
  std::vector<std::uint32_t> Order() const;

 private:
  struct Slot {
    std::uint32_t id;   // 0: free (the empty word is never looked up)
    std::uint32_t tag;  // the low half of the hash; its high bits choose the slot
  };

  void Grow();

  std::string bytes_;                  // the words, end to end
  std::vector<std::uint64_t> ends_;    // where each ends in bytes_
  std::vector<std::uint64_t> counts_;  // how often each was counted
  std::vector<Slot> slots_;            // open addressing with linear probing, a power of two long
  int shift_;                          // hash >> shift_ is the first slot
};

// A lexicon in its final order. Word i is bytes[ends[i - 1], ends[i]), with ends[-1] = 0.
struct FinalLexicon {
  explicit FinalLexicon(const Lexicon& lexicon);

  std::vector<std::uint8_t> bytes;
  std::vector<std::uint64_t> ends;
  std::vector<std::uint64_t> counts;
  std::vector<std::uint32_t> final_ids;  // of each id in `lexicon`
};

}  // namespace mvbert

#endif  // MVBERT_LEXICON_H_
