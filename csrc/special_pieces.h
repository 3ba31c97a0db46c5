// Special pieces, such as [MASK], inside text.

#ifndef MVBERT_SPECIAL_PIECES_H_
#define MVBERT_SPECIAL_PIECES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "piece_trie.h"

namespace mvbert {

// Finds special pieces as Hugging Face's slow tokenizer does: the leftmost first, then the longest.
// Immutable: any number of threads may use one. Time is linear in the bytes of the text, with the
// number of pieces and the length of the longest as a factor at worst.
class SpecialPieces {
 public:
  // Pieces with their ids. `cleaned`: also those that cleaning and NFC would turn into one, which
  // the definition keeps whole in cased text. Throws std::invalid_argument if a piece is empty, has
  // a space, or is there twice.
  SpecialPieces(std::vector<std::pair<std::string, std::int32_t>> pieces, bool cleaned);

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

  std::vector<std::pair<std::string, std::int32_t>> pieces_;
  const bool cleaned_;
  PieceTrie trie_;
  std::string first_bytes_;  // each once
};

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
    } else if (cleaned_) {
      end = CleanedEndAt(text, part, at, &id);
    }
    if (end == 0) {
      ++at;
      continue;
    }
    if (at > begin && !found(text.substr(begin, at - begin), -1)) return;
    if (!found(text.substr(at, end - at), id)) return;
    begin = at = end;
  }
  if (begin < text.size()) found(text.substr(begin), -1);
}

}  // namespace mvbert

#endif  // MVBERT_SPECIAL_PIECES_H_
