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

 private:
  struct Node {
    std::uint32_t first_child = 0;
    std::int32_t value = -1;  // the id of the key that ends here, or -1
    std::uint16_t children = 0;
    std::uint8_t byte = 0;  // that leads here
  };
  std::vector<Node> nodes_;
  std::uint32_t roots_[256] = {};  // the node of each first byte, or 0 (the root: leads nowhere)
};

}  // namespace mvbert

#endif  // MVBERT_PIECE_TRIE_H_
