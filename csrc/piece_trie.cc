#include "piece_trie.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace mvbert {

PieceTrie::PieceTrie(std::vector<std::pair<std::string_view, std::int32_t>> keys) {
  std::sort(keys.begin(), keys.end());
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto& [key, id] = keys[i];
    if (key.empty() || id < 0) throw std::invalid_argument("a piece must have bytes and an id");
    if (i > 0 && key == keys[i - 1].first) {
      throw std::invalid_argument("piece '" + std::string(key) + "' has two ids, " +
                                  std::to_string(keys[i - 1].second) + " and " +
                                  std::to_string(id));
    }
  }
  // Breadth first over ranges of the keys: range n holds the keys below node n.
  struct Range {
    std::size_t begin, end;
  };
  std::vector<Range> ranges = {{0, keys.size()}};
  nodes_.emplace_back();
  std::size_t level_end = 1;  // one past the last node of `depth` bytes
  std::size_t depth = 0;
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    if (n == level_end) {
      ++depth;
      level_end = nodes_.size();
    }
    auto [i, end] = ranges[n];
    if (i < end && keys[i].first.size() == depth) {
      nodes_[n].value = keys[i].second;
      ++i;
    }
    nodes_[n].first_child = static_cast<std::uint32_t>(nodes_.size());
    while (i < end) {
      const std::size_t begin = i;
      const char byte = keys[i].first[depth];
      while (i < end && keys[i].first[depth] == byte) ++i;
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
  for (std::size_t n = 1; n <= nodes_[0].children; ++n) {
    roots_[nodes_[n].byte] = static_cast<std::uint32_t>(n);
  }
}

std::size_t PieceTrie::LongestPrefix(std::string_view text, std::int32_t* id) const {
  std::size_t longest = 0;
  std::uint32_t node = kRoot;
  for (std::size_t i = 0; i < text.size(); ++i) {
    node = Step(node, text[i]);
    if (node == 0) break;
    if (nodes_[node].value >= 0) {
      longest = i + 1;
      *id = nodes_[node].value;
    }
  }
  return longest;
}

}  // namespace mvbert
