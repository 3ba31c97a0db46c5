// libFuzzer: the word stream and the lexicon do not depend on blocks, calls and threads, and hold
// the words that the splitter finds.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "corpus_builder.h"
#include "fuzz_input.h"

namespace mvbert {
namespace {

struct Built {
  bool refused = false;
  std::uint64_t error_at = 0;
  std::vector<std::uint32_t> train, heldout;  // final ids
  std::vector<std::string> words;
  std::uint64_t documents = 0;
  bool operator==(const Built& other) const {
    return refused == other.refused && error_at == other.error_at && train == other.train &&
           heldout == other.heldout && words == other.words && documents == other.documents;
  }
};

Built Build(std::string_view text, const CorpusOptions& options, std::size_t step) {
  Built built;
  CorpusBuilder builder(options);
  try {
    builder.BeginSource(0, Destination::kByDraw);
    Streams all;
    const auto take = [&] {
      Streams taken = builder.Take();
      for (auto& piece : taken.train) all.train.push_back(std::move(piece));
      for (auto& piece : taken.heldout) all.heldout.push_back(std::move(piece));
    };
    for (std::size_t at = 0; at < text.size(); at += step) {
      builder.AddText(text.substr(at, step));
      if (at % 3 == 0) take();
    }
    builder.Flush();
    take();
    const std::vector<std::uint32_t> final_ids = FinalLexicon(builder.lexicon()).final_ids;
    built.words.resize(final_ids.size());
    for (std::uint32_t id = 0; id < final_ids.size(); ++id) {
      built.words[final_ids[id]] = builder.lexicon().word(id);
    }
    for (const auto& piece : all.train) {
      for (const std::uint32_t id : piece) built.train.push_back(final_ids[id]);
    }
    for (const auto& piece : all.heldout) {
      for (const std::uint32_t id : piece) built.heldout.push_back(final_ids[id]);
    }
    built.documents = builder.totals().documents;
  } catch (const NotUtf8& error) {
    built = Built();
    built.refused = true;
    built.error_at = error.offset;
  }
  return built;
}

}  // namespace
}  // namespace mvbert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mvbert;
  FuzzInput input(data, size);
  const std::uint8_t flags = input.Byte();
  CorpusOptions options;
  options.split.lowercase = (flags & 1) != 0;
  options.replace = (flags & 2) != 0;
  options.heldout_share = (flags & 4) != 0 ? 0.4 : 0;
  options.seed = flags;
  const std::size_t small_step = input.Number(1, 64);
  const std::size_t small_block = input.Number(1, 300);
  const std::string text = input.Text();
  const std::size_t step = small_step + text.size() / 1000;
  const std::size_t block = small_block + text.size() / 1000;
  const Built whole = Build(text, options, std::max<std::size_t>(text.size(), 1));
  options.block_bytes = block;
  options.threads = (flags & 8) != 0 ? 3 : 1;
  Require(Build(text, options, step) == whole, "blocks, calls or threads change the corpus");
  if (whole.refused) {
    Require(!options.replace && whole.error_at == Utf8ErrorOffset(text), "refused elsewhere");
    return 0;
  }
  if (options.replace || options.heldout_share != 0) return 0;
  Words words;
  WordSplitter(options.split).Split(text, &words);
  std::size_t w = 0;
  for (const std::uint32_t id : whole.train) {
    if (id == kDocumentMark) continue;
    Require(w < words.ends.size(), "too many words");
    const std::uint32_t begin = w == 0 ? 0 : words.ends[w - 1];
    Require(whole.words[id] ==
                CutWord(std::string_view(words.bytes).substr(begin, words.ends[w] - begin)),
            "another word");
    ++w;
  }
  Require(w == words.ends.size(), "too few words");
  return 0;
}
