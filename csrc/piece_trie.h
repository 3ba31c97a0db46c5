// A set of strings with ids, for the longest that begins a text.

#ifndef MVBERT_PIECE_TRIE_H_
#define MVBERT_PIECE_TRIE_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace mvbert {

// A byte trie, its nodes in breadth-first order: the children of a node lie side by side, sorted,
// so that a step down a narrow path costs one cache line. Immutable: any number of threads may use
// one.
class PieceTrie {
 public:
  PieceTrie() = default;  // of no keys

  // The keys may come in any order. Throws std::invalid_argument if one is empty, comes twice or
  // has a negative id, and std::length_error past 2^32 - 1 nodes.
  explicit PieceTrie(std::vector<std::pair<std::string_view, std::int32_t>> keys);

  // The longest key that begins `text`: its length (0: none), its id through *id. O(length).
  std::size_t LongestPrefix(std::string_view text, std::int32_t* id) const;

  // The same byte by byte. Where one byte leads from kRoot or from a node that another byte led to;
  // 0 if no key continues so.
  static constexpr std::uint32_t kRoot = 0;
  std::uint32_t Step(std::uint32_t node, char byte) const;

  // The id of the key that led to a node, or -1. Precondition: node != kRoot.
  std::int32_t id(std::uint32_t node) const { return nodes_[node].value; }

 private:
  struct Node {
    std::uint32_t first_child = 0;
    std::int32_t value = -1;  // the id of the key that ends here, or -1
    std::uint16_t children = 0;
    std::uint8_t byte = 0;  // that leads here
  };
  std::vector<Node> nodes_;
  std::uint32_t roots_[256] = {};  // the node of each first byte, or 0
};

inline std::uint32_t PieceTrie::Step(std::uint32_t node, char byte) const {
  const auto wanted = static_cast<unsigned char>(byte);
  if (node == kRoot) return roots_[wanted];
  std::uint32_t child = nodes_[node].first_child;
  std::uint32_t end = child + nodes_[node].children;
  while (end - child > 8) {
    const std::uint32_t middle = child + (end - child) / 2;
    if (nodes_[middle].byte <= wanted) {
      child = middle;
    } else {
      end = middle;
    }
  }
  while (child < end && nodes_[child].byte < wanted) ++child;
  return child == end || nodes_[child].byte != wanted ? 0 : child;
}

}  // namespace mvbert

#endif  // MVBERT_PIECE_TRIE_H_
