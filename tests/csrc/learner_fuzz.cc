// libFuzzer: vocabularies learned from any words: exact size, the same in any order and with any
// number of threads, and used as often as greedy cutting says.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz_input.h"
#include "segmentation.h"
#include "vocab_learner.h"
#include "wordpiece.h"
#include "words.h"

namespace mvbert {
namespace {

struct CountedWords {
  std::string bytes;
  std::vector<std::uint64_t> ends, counts;
  void Add(std::string_view word, std::uint64_t count) {
    bytes.append(word);
    ends.push_back(bytes.size());
    counts.push_back(count);
  }
  LearnedVocab Learn(const LearnOptions& options) const {
    return LearnVocab(bytes, ends.data(), counts.data(), ends.size(), options);
  }
};

}  // namespace
}  // namespace mvbert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mvbert;
  FuzzInput input(data, size);
  LearnOptions options;
  options.size = input.Number(0, 200);
  options.coverage = input.Byte() % 2 == 0 ? 1.0 : 0.9;
  options.threads = 1;
  const std::uint32_t salt = input.Number(1, 1000);
  Words words;
  const bool lowercase = input.Byte() % 2 == 0;
  WordSplitter({lowercase}).Split(input.Utf8Text(), &words);
  std::set<std::string> distinct;
  std::uint32_t begin = 0;
  for (const std::uint32_t end : words.ends) {
    distinct.insert(words.bytes.substr(begin, end - begin));
    begin = end;
  }
  CountedWords forward, backward;
  std::vector<std::pair<std::string, std::uint64_t>> counted;
  for (const std::string& word : distinct) {
    counted.emplace_back(word, (counted.size() * salt) % 7);  // some of count 0
  }
  for (const auto& [word, count] : counted) forward.Add(word, count);
  std::reverse(counted.begin(), counted.end());
  for (const auto& [word, count] : counted) backward.Add(word, count);
  LearnedVocab vocab;
  try {
    vocab = forward.Learn(options);
  } catch (const std::invalid_argument&) {
    bool refused = false;
    try {
      backward.Learn(options);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    Require(refused, "refused in one order only");
    return 0;
  }
  options.threads = 2;
  const LearnedVocab again = backward.Learn(options);
  Require(again.pieces == vocab.pieces && again.uses == vocab.uses, "the order of words matters");
  Require(vocab.pieces.size() == options.size && vocab.uses.size() == options.size, "another size");
  const WordPiece wordpiece(vocab.pieces, 1);  // throws if a piece is there twice
  const Segmentation cut =
      SegmentLexicon(forward.bytes, forward.ends.data(), forward.ends.size(), wordpiece, 2);
  if (options.coverage < 1) return 0;  // words that are not covered count for nothing
  std::vector<std::uint64_t> uses(options.size, 0);
  std::uint32_t first = 0;
  for (std::size_t w = 0; w < forward.ends.size(); ++w) {
    for (; first < cut.ends[w]; ++first) {
      if (cut.ids[first] != 1) uses[static_cast<std::size_t>(cut.ids[first])] += forward.counts[w];
    }
  }
  for (std::size_t i = kSpecialTokenCount; i < uses.size(); ++i) {
    Require(uses[i] == vocab.uses[i], "another number of uses");
  }
  return 0;
}
