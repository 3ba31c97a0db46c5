#include "wordpiece.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

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

void WordPiece::Trie::Build(const std::vector<std::pair<std::string_view, std::int32_t>>& sorted) {
  // Breadth first over ranges of the sorted keys; each node's children are placed at the first base
  // where all their cells are free (a double array, Aoe 1989).
  struct Todo {
    std::uint32_t node;
    std::size_t begin, end, depth;
  };
  std::vector<Todo> queue;
  bases_.assign(1, 0);
  values_.assign(1, -1);
  queue.push_back({0, 0, sorted.size(), 0});
  std::size_t first_free = 0;
  std::vector<std::pair<unsigned char, std::size_t>> children;  // byte, first key
  for (std::size_t q = 0; q < queue.size(); ++q) {
    const Todo todo = queue[q];
    std::size_t i = todo.begin;
    if (i < todo.end && sorted[i].first.size() == todo.depth) {
      values_[todo.node] = sorted[i].second;
      ++i;
    }
    if (i == todo.end) continue;
    children.clear();
    for (; i < todo.end; ++i) {
      const auto byte = static_cast<unsigned char>(sorted[i].first[todo.depth]);
      if (children.empty() || children.back().first != byte) children.emplace_back(byte, i);
    }
    while (first_free < cells_.size() && cells_[first_free].owner != 0xFFFFFFFF) ++first_free;
    std::size_t base = first_free > children[0].first ? first_free - children[0].first : 0;
    for (int tries = 0;; ++base, ++tries) {
      if (tries == 64) base = cells_.size();  // bounds the search; costs some empty cells
      if (cells_.size() < base + 256) cells_.resize(base + 256);
      bool free = true;
      for (const auto& child : children) {
        free = free && cells_[base + child.first].owner == 0xFFFFFFFF;
      }
      if (free) break;
    }
    if (base + 256 > std::numeric_limits<std::uint32_t>::max()) {
      throw std::length_error("the vocabulary is too large for its trie");
    }
    bases_[todo.node] = static_cast<std::uint32_t>(base);
    for (std::size_t k = 0; k < children.size(); ++k) {
      const auto node = static_cast<std::uint32_t>(bases_.size());
      cells_[base + children[k].first] = {todo.node, node};
      bases_.push_back(0);
      values_.push_back(-1);
      const std::size_t end = k + 1 < children.size() ? children[k + 1].second : todo.end;
      queue.push_back({node, children[k].second, end, todo.depth + 1});
    }
  }
  // A leaf's base stays 0; its lookups must stay inside the array and find other owners.
  if (cells_.size() < 256) cells_.resize(256);
}

std::size_t WordPiece::Trie::LongestPrefix(std::string_view text, std::int32_t* id) const {
  std::uint32_t node = 0;
  std::size_t best = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const Cell cell = cells_[bases_[node] + static_cast<unsigned char>(text[i])];
    if (cell.owner != node) break;
    node = cell.child;
    if (values_[node] >= 0) {
      best = i + 1;
      *id = values_[node];
    }
  }
  return best;
}

WordPiece::WordPiece(std::vector<std::string> pieces, std::int32_t unk_id, int max_chars)
    : pieces_(std::move(pieces)), unk_id_(unk_id), max_chars_(max_chars) {
  if (pieces_.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("more than 2^31 - 1 pieces: ids are 32-bit");
  }
  if (unk_id < 0 || static_cast<std::size_t>(unk_id) >= pieces_.size()) {
    throw std::invalid_argument("unk_id " + std::to_string(unk_id) + " is not in [0, " +
                                std::to_string(pieces_.size()) + ")");
  }
  std::vector<std::pair<std::string_view, std::int32_t>> initial, continued;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const std::string_view piece = pieces_[i];
    const auto id = static_cast<std::int32_t>(i);
    if (!piece.empty()) initial.emplace_back(piece, id);
    if (piece.size() > 2 && piece.substr(0, 2) == "##") continued.emplace_back(piece.substr(2), id);
  }
  std::sort(initial.begin(), initial.end());
  std::sort(continued.begin(), continued.end());
  for (std::size_t i = 1; i < initial.size(); ++i) {
    if (initial[i].first == initial[i - 1].first) {
      throw std::invalid_argument("piece '" + std::string(initial[i].first) + "' has two ids, " +
                                  std::to_string(initial[i - 1].second) + " and " +
                                  std::to_string(initial[i].second));
    }
  }
  initial_.Build(initial);
  continued_.Build(continued);
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
    const std::size_t length = (at == 0 ? initial_ : continued_).LongestPrefix(word.substr(at), &id);
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
