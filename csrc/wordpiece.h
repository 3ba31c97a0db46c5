// Word -> pieces: greedy longest match first (Wu et al., "Google's Neural Machine Translation
// System", arXiv 1609.08144, as BERT uses it).

#ifndef MVBERT_WORDPIECE_H_
#define MVBERT_WORDPIECE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "piece_trie.h"

namespace mvbert {

// Immutable after construction: any number of threads may use one.
class WordPiece {
 public:
  // Piece i has id i. Pieces that begin with "##" continue a word. Throws std::invalid_argument if
  // a piece appears twice, if unk_id is not in [0, pieces.size()) or its piece continues a word, or
  // if there are more than 2^31 - 1. An empty piece is an id that never comes out.
  WordPiece(std::vector<std::string> pieces, std::int32_t unk_id, int max_chars = 100);

  WordPiece(const WordPiece&) = delete;
  WordPiece& operator=(const WordPiece&) = delete;

  // Appends the ids of `word`, which must be well-formed UTF-8: at each place the longest piece
  // that matches; unk_id alone if somewhere none does, or if the word has more than max_chars code
  // points. Nothing for an empty word. O(length x longest piece), no allocation but the output's.
  void Cut(std::string_view word, std::vector<std::int32_t>* ids) const;

  // As above, and appends to *ends the offset in `word` where each piece ends.
  void Cut(std::string_view word, std::vector<std::int32_t>* ids,
           std::vector<std::uint32_t>* ends) const;

  std::size_t size() const { return pieces_.size(); }
  std::int32_t unk_id() const { return unk_id_; }
  const std::string& piece(std::int32_t id) const { return pieces_[static_cast<std::size_t>(id)]; }

 private:
  std::vector<std::string> pieces_;
  std::int32_t unk_id_;
  int max_chars_;
  PieceTrie initial_;    // every piece
  PieceTrie continued_;  // pieces that begin with "##", without it
};

}  // namespace mvbert

#endif  // MVBERT_WORDPIECE_H_
