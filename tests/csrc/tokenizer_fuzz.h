// What a fuzzer asks of the tokenizer, for any bytes: the same words by every instruction set, the
// same ids from the cache, from the tries, with spans, mixed, and on several threads. Aborts if
// not.

#ifndef MVBERT_TESTS_TOKENIZER_FUZZ_H_
#define MVBERT_TESTS_TOKENIZER_FUZZ_H_

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "ascii_run.h"
#include "fuzz_input.h"
#include "tokenizer.h"
#include "unicode.h"
#include "wordpiece.h"
#include "words.h"

namespace mvbert {

// With `fillers`, so many that pieces of the cache are packed the wide way.
inline std::vector<std::string> FuzzPieces(const char* extra, int fillers = 0) {
  std::vector<std::string> pieces = {"[PAD]",        "[UNK]", "[CLS]",      "[SEP]",
                                     "[MASK]",       "the",   "##ing",      "\xC3\xA9",
                                     "\xE4\xB8\xAD", "hello", "##\xD0\xBE", extra};
  for (char c = '!'; c <= '~'; ++c) {
    const std::string letter(1, c);
    pieces.push_back(letter);
    pieces.push_back("##" + letter);
  }
  for (int i = 0; i < fillers; ++i) pieces.push_back("filler" + std::to_string(i));
  return pieces;
}

struct FuzzTokenizers {
  explicit FuzzTokenizers(SplitOptions options)
      : teacher(std::make_shared<WordPiece>(FuzzPieces("##tion", options.strip_accents ? 0 : 70000),
                                            1)),
        student(std::make_shared<WordPiece>(FuzzPieces("##ab"), 1)),
        splitter(options),
        mixed(options, teacher, student,
              {{"[MASK]", 4, false},
               {"[SEP]", 3, false},
               {"Hell\xC3\xB6", 9, true},
               {"the", 5, true}}) {}
  std::shared_ptr<WordPiece> teacher, student;
  WordSplitter splitter;
  Tokenizer mixed;
};

inline void CheckText(std::string_view bytes, const FuzzTokenizers& all) {
  if (Utf8ErrorOffset(bytes) != kNoError) {
    Words words;
    bool refused = false;
    try {
      all.splitter.Split(bytes, &words);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    Require(refused, "ill-formed text was taken");
    const std::string mended = ReplaceIllFormed(bytes);
    Require(Utf8ErrorOffset(mended) == kNoError, "mended text is ill-formed");
    CheckText(mended, all);
    return;
  }
  Words words;
  all.splitter.Split(bytes, &words);
  for (const AsciiRunChoice& choice : AsciiRunChoices()) {
    Words same;
    WordSplitter(all.splitter.options(), choice).Split(bytes, &same);
    Require(same.bytes == words.bytes && same.ends == words.ends, "instruction sets differ");
  }
  std::vector<std::int32_t> cut;
  std::uint32_t begin = 0;
  for (const std::uint32_t end : words.ends) {
    Require(end > begin, "an empty word");
    all.teacher->Cut(std::string_view(words.bytes).substr(begin, end - begin), &cut);
    begin = end;
  }
  const auto equal = [&cut](const IdBuffer& ids, std::size_t from) {
    Require(ids.size() - from == cut.size(), "another number of ids");
    for (std::size_t i = 0; i < cut.size(); ++i) {
      Require(ids.data()[from + i] == cut[i], "another id");
    }
  };
  for (int round = 0; round < 2; ++round) {  // the second time from the cache
    Encoding encoding;
    all.mixed.Encode({bytes, bytes, bytes}, TextOptions(), 0, 1 + 2 * round, &encoding);
    Require(encoding.ends.size() == 3 && encoding.ends[0] == cut.size(), "wrong ends");
    equal(encoding.ids, 2 * cut.size());
  }
  IdBuffer with_special, with_spans, spans, mixed, mixed_again;
  TextOptions special;
  special.find_special = true;
  all.mixed.EncodeWords(bytes, special, 0, &with_special, nullptr);
  all.mixed.EncodeSpans(bytes, true, &with_spans, &spans);
  Require(2 * with_spans.size() == spans.size(), "a piece without a span");
  cut.assign(with_spans.data(), with_spans.end());
  equal(with_special, 0);
  for (const std::int32_t* span = spans.data(); span < spans.end(); span += 2) {
    Require(0 <= span[0] && span[0] < span[1] && static_cast<std::size_t>(span[1]) <= bytes.size(),
            "a span outside the text");
  }
  TextOptions coin;
  coin.coin.threshold = std::uint64_t{1} << 31;
  coin.coin.seed = bytes.size();
  WordMap map;
  all.mixed.EncodeWords(bytes, coin, 5, &mixed, &map);
  all.mixed.EncodeWords(bytes, coin, 5, &mixed_again, nullptr);
  Require(map.starts.size() == words.ends.size(), "another number of words");
  cut.assign(mixed.data(), mixed.end());
  equal(mixed_again, 0);
}

// Made by the first call, which takes longer than a short text may.
inline const std::array<FuzzTokenizers, 3>& AllFuzzTokenizers() {
  static const std::array<FuzzTokenizers, 3> all{
      FuzzTokenizers({true, true}), FuzzTokenizers({false, false}), FuzzTokenizers({true, false})};
  return all;
}

inline void CheckText(std::string_view bytes) {
  for (const FuzzTokenizers& tokenizers : AllFuzzTokenizers()) CheckText(bytes, tokenizers);
}

}  // namespace mvbert

#endif  // MVBERT_TESTS_TOKENIZER_FUZZ_H_
