// Special pieces inside text: [MASK] and its like, and what people have added.

#ifndef MVBERT_SPECIAL_PIECES_H_
#define MVBERT_SPECIAL_PIECES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "piece_trie.h"
#include "words.h"

namespace mvbert {

// A string that is recognised in text. Normalised: in whatever the splitter makes it of, such as
// another case; else only as it is written. The latter are found first.
struct SpecialPiece {
  std::string piece;
  std::int32_t id;
  bool normalized;
};

// Finds special pieces as Hugging Face's slow tokenizer does: the leftmost first, then the longest.
// Immutable: any number of threads may use one. Time is linear in the bytes of the text, with the
// length of the longest piece as a factor at worst, and the number of pieces in cased text.
class SpecialPieces {
 public:
  // Of equal pieces the first counts. Throws std::invalid_argument if a piece is empty or has a
  // space, or if an id is not in [0, vocabulary_size).
  SpecialPieces(const std::vector<SpecialPiece>& pieces, const WordSplitter& splitter,
                std::size_t vocabulary_size);

  // Calls found(text, -1) for stretches between special pieces, never empty, and found(text, id)
  // for these, until it gives false or `text`, well-formed UTF-8, ends.
  template <typename Found>
  void Split(std::string_view text, Found&& found) const;

 private:
  // The end of the piece at text[at], written out (0: there is none), its id through *id.
  std::size_t EndAt(std::string_view text, std::size_t at, std::int32_t* id) const {
    const std::size_t length = trie_.LongestPrefix(text.substr(at), id);
    return length == 0 ? 0 : at + length;
  }

  // The same for a piece with deleted characters inside, or written with a character that NFC
  // replaces: kept whole in cased text if nothing but space is around it. text[0, begin) is not
  // looked at.
  std::size_t CleanedEndAt(std::string_view text, std::size_t begin, std::size_t at,
                           std::int32_t* id) const;

  // The end of what becomes a normalised piece and begins at text[at] (0: nothing does), the
  // longest.
  std::size_t NormalizedEndAt(std::string_view text, std::size_t at, std::int32_t* id) const;

  // Split for the normalised pieces, in a stretch, not empty, without others; false if `found` gave
  // false.
  template <typename Found>
  bool SplitAtNormalized(std::string_view text, Found&& found) const;

  const SplitOptions options_;
  std::vector<std::pair<std::string, std::int32_t>> written_;  // looked for as they are written
  PieceTrie trie_;                                             // of these
  std::string first_bytes_;                                    // of these, each once
  bool has_normalized_ = false;
  PieceTrie normalized_;
  std::array<bool, 256> first_normalized_{};  // bytes of text that may become the first of one
};

template <typename Found>
bool SpecialPieces::SplitAtNormalized(std::string_view text, Found&& found) const {
  std::size_t begin = 0;
  for (std::size_t at = 0; has_normalized_ && at < text.size();) {
    std::int32_t id = -1;
    const bool candidate = first_normalized_[static_cast<unsigned char>(text[at])];
    const std::size_t end = candidate ? NormalizedEndAt(text, at, &id) : 0;
    if (end == 0) {
      ++at;
      continue;
    }
    if (at > begin && !found(text.substr(begin, at - begin), -1)) return false;
    if (!found(text.substr(at, end - at), id)) return false;
    begin = at = end;
  }
  return begin == text.size() || found(text.substr(begin), -1);
}

template <typename Found>
void SpecialPieces::Split(std::string_view text, Found&& found) const {
  std::size_t part = 0;   // where the last special piece that was written out ends
  std::size_t begin = 0;  // what is not yet found
  std::size_t at = 0;
  while (at < text.size()) {
    at = first_bytes_.size() == 1 ? text.find(first_bytes_[0], at)  // at memory speed
                                  : text.find_first_of(first_bytes_, at);
    if (at == std::string_view::npos) break;
    std::int32_t id = -1;
    std::size_t end = EndAt(text, at, &id);
    if (end != 0) {
      part = end;
    } else if (!options_.lowercase) {
      end = CleanedEndAt(text, part, at, &id);
    }
    if (end == 0) {
      ++at;
      continue;
    }
    if (at > begin && !SplitAtNormalized(text.substr(begin, at - begin), found)) return;
    if (!found(text.substr(at, end - at), id)) return;
    begin = at = end;
  }
  if (begin < text.size()) SplitAtNormalized(text.substr(begin), found);
}

}  // namespace mvbert

#endif  // MVBERT_SPECIAL_PIECES_H_
