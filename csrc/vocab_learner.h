// Learns a WordPiece vocabulary from (word, count) alone, top-down.
//
// The rule is the one that TensorFlow Text's wordpiece_vocab tool runs (its guide "Subword
// tokenizers" describes it; where guide and tool differ the tool is followed, see below):
//
//   round 0     count every suffix of every word, weighted by the word's count. The whole word
//               counts as a word-initial piece, a proper suffix as a "##" piece.
//   keep        pieces whose count reaches a threshold, and every single character.
//   rounds 1-3  cut each word greedily with the pieces kept before, count again, this time only the
//               suffixes that start where a piece starts, keep again.
//
// The guide says that a kept piece's count is taken from its prefixes; the tool takes every
// substring's count from its prefixes, kept or not, and what is left of a substring then is exactly
// how often it ends a word. Hence "suffixes". The guide's wording keeps frequent stems too and
// gives fewer pieces a word, but far fewer of them are in BERT's own vocabulary.
//
// A search on the threshold and a trim make the size exact; pieces that greedy cutting never uses
// are replaced. Each round of that bars at least one suffix of the words for good, so it ends: with
// pieces that are all used, or refused when too few are left. mvbert/text/learner_reference.py is
// the same algorithm in plain Python.

#ifndef MVBERT_VOCAB_LEARNER_H_
#define MVBERT_VOCAB_LEARNER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mvbert {

// The first pieces of every learned vocabulary; the position is the id.
inline constexpr std::string_view kSpecialTokens[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
inline constexpr std::size_t kSpecialTokenCount = 5;

// Longer words are [UNK] to WordPiece whatever the vocabulary, so nothing is learned from them.
inline constexpr std::size_t kMaxWordCharacters = 100;

// Rounds of counting; TensorFlow Text's default.
inline constexpr int kLearnerRounds = 4;

struct LearnOptions {
  std::size_t size = 0;  // pieces wanted, special tokens included
  double coverage =
      1.0;          // share of character occurrences that single characters must cover, (0, 1]
  int threads = 1;  // at least 1
};

struct LearnedVocab {
  // Special tokens, then pieces by descending use, ties by bytes.
  std::vector<std::string> pieces;
  // How often greedy cutting of the words uses each piece; 0 for special tokens.
  std::vector<std::uint64_t> uses;
  std::size_t alphabet = 0;     // single-character pieces, both forms counted
  std::uint64_t threshold = 0;  // the count that kept pieces reach
};

// Learns exactly options.size pieces from `words` distinct words: word i is
// bytes[ends[i - 1], ends[i]) with ends[-1] = 0, and occurs counts[i] times. Empty words, words of
// count 0, words over kMaxWordCharacters and words with a character outside the covered alphabet
// take no part.
//
// The result depends on words and options only: not on the number of threads, nor on the order of
// the words. Time is linear in the characters of the words; memory is about 12 bytes a character.
// Thread-safe: no shared state.
//
// Throws std::invalid_argument when a word is not UTF-8, holds white space or begins with "##" (the
// splitter never makes such words), when an option is out of range, when options.size is below the
// alphabet, and when the words give fewer pieces than options.size.
LearnedVocab LearnVocab(std::string_view bytes, const std::uint64_t* ends,
                        const std::uint64_t* counts, std::size_t words,
                        const LearnOptions& options);

}  // namespace mvbert

#endif  // MVBERT_VOCAB_LEARNER_H_
