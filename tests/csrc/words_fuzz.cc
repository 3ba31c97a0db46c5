// libFuzzer: UTF-8 checking and word splitting agree with themselves, in whatever steps they run.

#include <cstddef>
#include <cstdint>
#include <string>

#include "ascii_run.h"
#include "fuzz_input.h"
#include "words.h"

namespace mvbert {
namespace {

void CheckWords(std::string_view text, SplitOptions options, std::size_t most) {
  Words whole;
  const WordSplitter splitter(options);
  splitter.Split(text, &whole);
  std::uint32_t begin = 0;
  for (const std::uint32_t end : whole.ends) {
    Require(end > begin, "an empty word");
    const auto word = std::string_view(whole.bytes).substr(begin, end - begin);
    Require(word.find_first_of(" \t\r\n") == std::string_view::npos, "a space in a word");
    Require(Utf8ErrorOffset(word) == kNoError, "a word that is not UTF-8");
    begin = end;
  }
  for (const AsciiRunChoice& choice : AsciiRunChoices()) {
    for (const bool track : {false, true}) {
      WordBatch batch;
      if (track) batch.TrackSources();
      Words steps;
      std::size_t at = 0;
      do {
        const std::size_t before = at;
        at = WordSplitter(options, choice).Fill(text, at, &batch, most);
        Require(at > before || text.empty(), "a step that reads nothing");
        // (A batch may be used before it is full, and need not be used when it is.)
        if (at < text.size() && batch.size() % 3 != 0) continue;
        for (std::size_t i = 0; i < batch.size(); ++i) {
          steps.bytes.append(batch[i]);
          steps.ends.push_back(static_cast<std::uint32_t>(steps.bytes.size()));
          if (!track) continue;
          batch.WithSources([&](auto sources) {
            const std::uint32_t from = sources.begin(batch.start(i), batch.end(i));
            const std::uint32_t to = sources.end(batch.start(i), batch.end(i));
            Require(from < to && to <= text.size(), "a source outside the text");
          });
        }
        batch.Clear();
      } while (at < text.size());
      Require(steps.bytes == whole.bytes && steps.ends == whole.ends, "steps give other words");
    }
  }
}

}  // namespace
}  // namespace mvbert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mvbert;
  FuzzInput input(data, size);
  const std::size_t most = input.Number(1, 600);
  const std::string bytes = input.Text();
  const TimeLimit limit(bytes);
  const std::size_t error = Utf8ErrorOffset(bytes);
  Require(error == kNoError || error < bytes.size(), "an error outside the text");
  const std::string text = ReplaceIllFormed(bytes);
  Require(Utf8ErrorOffset(text) == kNoError, "mended text is not UTF-8");
  Require(error != kNoError || text == bytes, "well-formed text was changed");
  if (error != kNoError) {
    Require(Utf8ErrorOffset(std::string_view(bytes).substr(0, error)) == kNoError,
            "there was an error before");
  }
  CheckWords(text, {true, true}, most);
  CheckWords(text, {false, false}, most);
  CheckWords(text, {true, false}, most);
  return 0;
}
