#include "wordpiece.h"

#include <limits>
#include <stdexcept>
#include <utility>

namespace mvbert {
namespace {

bool TooLong(std::string_view word, int max_chars) {
  if (word.size() <= static_cast<std::size_t>(max_chars)) return false;
  int chars = 0;
  for (const char c : word) {
    chars += (c & 0xC0) != 0x80;
    if (chars > max_chars) return true;
  }
  return false;
}

}  // namespace

WordPiece::WordPiece(std::vector<std::string> pieces, std::int32_t unk_id, int max_chars)
    : pieces_(std::move(pieces)), unk_id_(unk_id), max_chars_(max_chars) {
  if (pieces_.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("more than 2^31 - 1 pieces: ids are 32-bit");
  }
  if (unk_id < 0 || static_cast<std::size_t>(unk_id) >= pieces_.size()) {
    throw std::invalid_argument("unk_id " + std::to_string(unk_id) + " is not in [0, " +
                                std::to_string(pieces_.size()) + ")");
  }
  const std::string& unk = pieces_[static_cast<std::size_t>(unk_id)];
  if (unk.compare(0, 2, "##") == 0) {
    throw std::invalid_argument("the unknown piece '" + unk + "' continues a word: it must be one");
  }
  std::vector<std::pair<std::string_view, std::int32_t>> initial, continued;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const std::string_view piece = pieces_[i];
    const auto id = static_cast<std::int32_t>(i);
    if (!piece.empty()) initial.emplace_back(piece, id);
    if (piece.size() > 2 && piece.substr(0, 2) == "##") continued.emplace_back(piece.substr(2), id);
  }
  initial_ = PieceTrie(std::move(initial));
  continued_ = PieceTrie(std::move(continued));
}

void WordPiece::Cut(std::string_view word, std::vector<std::int32_t>* ids) const {
  Cut(word, ids, nullptr);
}

void WordPiece::Cut(std::string_view word, std::vector<std::int32_t>* ids,
                    std::vector<std::uint32_t>* ends) const {
  if (word.empty()) return;
  const std::size_t before = ids->size();
  std::size_t at = 0;
  bool known = !TooLong(word, max_chars_);
  while (known && at < word.size()) {
    std::int32_t id = 0;
    const std::size_t length =
        (at == 0 ? initial_ : continued_).LongestPrefix(word.substr(at), &id);
    known = length > 0;
    if (!known) break;
    ids->push_back(id);
    at += length;
    if (ends != nullptr) ends->push_back(static_cast<std::uint32_t>(at));
  }
  if (known) return;
  if (ends != nullptr) {
    ends->resize(ends->size() - (ids->size() - before));
    ends->push_back(static_cast<std::uint32_t>(word.size()));
  }
  ids->resize(before);
  ids->push_back(unk_id_);
}

}  // namespace mvbert
