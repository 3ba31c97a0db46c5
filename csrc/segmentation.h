// Cutting a whole lexicon with one vocabulary.

#ifndef MVBERT_SEGMENTATION_H_
#define MVBERT_SEGMENTATION_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "wordpiece.h"

namespace mvbert {

// The pieces of word w are ids[ends[w - 1], ends[w]), with ends[-1] = 0.
struct Segmentation {
  std::vector<std::uint32_t> ends;
  std::vector<std::int32_t> ids;
};

// Cuts the words bytes[word_ends[w - 1], word_ends[w]), well-formed UTF-8, on `threads` threads;
// the result does not depend on how many. About 0.1-0.3 us a word. An empty word has no pieces.
// Throws std::length_error past 2^32 - 1 pieces and std::invalid_argument if the ends do not ascend
// within the bytes.
Segmentation SegmentLexicon(std::string_view bytes, const std::uint64_t* word_ends,
                            std::size_t words, const WordPiece& wordpiece, int threads);

}  // namespace mvbert

#endif  // MVBERT_SEGMENTATION_H_
