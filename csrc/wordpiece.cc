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
  // Breadth first over ranges of the sorted keys: range n holds the keys below node n.
  struct Range {
    std::size_t begin, end;
  };
  std::vector<Range> ranges = {{0, sorted.size()}};
  nodes_.assign(1, Node());
  std::size_t level_end = 1;  // one past the last node of `depth` bytes
  std::size_t depth = 0;
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    if (n == level_end) {
      ++depth;
      level_end = nodes_.size();
    }
    auto [i, end] = ranges[n];
    if (i < end && sorted[i].first.size() == depth) {
      nodes_[n].value = sorted[i].second;
      ++i;
    }
    nodes_[n].first_child = static_cast<std::uint32_t>(nodes_.size());
    while (i < end) {
      const std::size_t begin = i;
      const char byte = sorted[i].first[depth];
      while (i < end && sorted[i].first[depth] == byte) ++i;
      Node child;
      child.byte = static_cast<std::uint8_t>(byte);
      nodes_.push_back(child);
      ranges.push_back({begin, i});
    }
    if (nodes_.size() > std::numeric_limits<std::uint32_t>::max()) {
      throw std::length_error("the vocabulary is too large for its trie");
    }
    nodes_[n].children = static_cast<std::uint16_t>(nodes_.size() - nodes_[n].first_child);
  }
  std::fill(std::begin(roots_), std::end(roots_), 0);
  for (std::size_t n = 1; n <= nodes_[0].children; ++n) {
    roots_[nodes_[n].byte] = static_cast<std::uint32_t>(n);
  }
}

std::size_t WordPiece::Trie::LongestPrefix(std::string_view text, std::int32_t* id) const {
  if (text.empty()) return 0;
  std::uint32_t at = roots_[static_cast<unsigned char>(text[0])];
  if (at == 0) return 0;
  std::size_t best = 0;
  for (std::size_t i = 1;; ++i) {
    const Node& node = nodes_[at];
    if (node.value >= 0) {
      best = i;
      *id = node.value;
    }
    if (i == text.size()) return best;
    const auto byte = static_cast<unsigned char>(text[i]);
    std::uint32_t child = node.first_child;
    std::uint32_t end = child + node.children;
    while (end - child > 8) {
      const std::uint32_t middle = child + (end - child) / 2;
      if (nodes_[middle].byte <= byte) {
        child = middle;
      } else {
        end = middle;
      }
    }
    while (child < end && nodes_[child].byte < byte) ++child;
    if (child == end || nodes_[child].byte != byte) return best;
    at = child;
  }
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
