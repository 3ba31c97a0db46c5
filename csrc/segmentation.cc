#include "segmentation.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "share.h"

namespace mvbert {

namespace {

constexpr std::size_t kChunkWords = 1 << 14;

}  // namespace

Segmentation SegmentLexicon(std::string_view bytes, const std::uint64_t* word_ends,
                            std::size_t words, const WordPiece& wordpiece, int threads) {
  std::uint64_t last = 0;
  for (std::size_t w = 0; w < words; ++w) {
    if (word_ends[w] < last || word_ends[w] > bytes.size()) {
      throw std::invalid_argument("the ends of the words must ascend from 0 to " +
                                  std::to_string(bytes.size()) + ", but word " + std::to_string(w) +
                                  " ends at " + std::to_string(word_ends[w]));
    }
    last = word_ends[w];
  }

  // Each chunk of words has its own vectors, whose ends count from the chunk's first piece.
  const std::size_t chunks = (words + kChunkWords - 1) / kChunkWords;
  std::vector<Segmentation> parts(chunks);
  Share(chunks, threads, [&](auto&& next) {
    for (std::size_t c; next(&c);) {
      Segmentation& part = parts[c];
      const std::size_t end = std::min(words, (c + 1) * kChunkWords);
      part.ends.reserve(end - c * kChunkWords);
      for (std::size_t w = c * kChunkWords; w < end; ++w) {
        const std::uint64_t begin = w == 0 ? 0 : word_ends[w - 1];
        wordpiece.Cut(bytes.substr(begin, word_ends[w] - begin), &part.ids);
        part.ends.push_back(static_cast<std::uint32_t>(part.ids.size()));
      }
    }
  });

  std::size_t pieces = 0;
  for (const Segmentation& part : parts) pieces += part.ids.size();
  if (pieces > std::numeric_limits<std::uint32_t>::max()) {
    throw std::length_error("the words have " + std::to_string(pieces) +
                            " pieces; a segmentation holds at most 2^32 - 1");
  }
  Segmentation whole;
  whole.ends.reserve(words);
  whole.ids.reserve(pieces);
  for (Segmentation& part : parts) {
    const auto base = static_cast<std::uint32_t>(whole.ids.size());
    for (const std::uint32_t end : part.ends) whole.ends.push_back(base + end);
    whole.ids.insert(whole.ids.end(), part.ids.begin(), part.ids.end());
    part = Segmentation{};
  }
  return whole;
}

}  // namespace mvbert
