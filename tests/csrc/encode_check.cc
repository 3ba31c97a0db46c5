// Encodes text like English under made-up vocabularies, for sanitizers and instruction counts.
//
//   encode_check             compares texts one by one with all at once, by 1 and by 3 threads
//   encode_check plain|mixed|spans
//                            encodes twice, the second time inside Measured...() (for callgrind),
//                            with spans as rows, and prints how many bytes that were and how ASCII
//                            was read

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "ascii_run.h"
#include "token_rows.h"
#include "tokenizer.h"

namespace {

// (The distributions of <random> may differ between libraries; these do not.)
class Random {
 public:
  std::uint64_t Below(std::uint64_t n) { return engine_() % n; }
  double Unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 engine_{7};
};

struct World {
  std::vector<std::string> teacher_pieces = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
  std::vector<std::string> student_pieces = teacher_pieces;
  std::vector<std::string> texts;
  std::size_t bytes = 0;

  // A lexicon of 30,000 words, frequent ones short; the teacher knows the first 15,000 whole, the
  // student every fifth of these. Texts of about 2,400 bytes, words by Zipf's law.
  explicit World(std::size_t count) {
    Random random;
    for (char c = '!'; c <= '~'; ++c) {
      if (c >= 'A' && c <= 'Z') continue;
      for (auto* pieces : {&teacher_pieces, &student_pieces}) {
        pieces->emplace_back(1, c);
        pieces->push_back(std::string("##") + c);
      }
    }
    std::vector<std::string> words;
    while (words.size() < 30000) {
      // Its rank in bijective base 20, a syllable a digit (some words come out twice).
      std::string word;
      for (std::size_t rank = words.size() + 1; rank > 0; rank = (rank - 1) / 20) {
        static const char* const kSyllables[] = {"a",  "the", "ing", "er", "o",  "in", "st",
                                                 "re", "n",   "is",  "ma", "li", "t",  "con",
                                                 "de", "u",   "sh",  "ly", "ar", "or"};
        word += kSyllables[(rank - 1) % 20];
      }
      words.push_back(word);
    }
    std::vector<std::string> known;
    for (std::size_t i = 0; i < 15000; ++i) {
      if (words[i].size() > 1) known.push_back(words[i]);
    }
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    for (std::size_t i = 0; i < known.size(); ++i) {
      teacher_pieces.push_back(known[i]);
      if (i % 5 == 0) student_pieces.push_back(known[i]);
    }
    for (std::size_t t = 0; t < count; ++t) {
      std::string text;
      while (text.size() < 2400) {
        std::string word = words[static_cast<std::size_t>(std::pow(30000.0, random.Unit())) - 1];
        if (random.Below(12) == 0) word[0] = static_cast<char>(word[0] - 32);
        text += word;
        text += random.Below(8) == 0 ? ", " : random.Below(16) == 0 ? ".\n" : " ";
        if (random.Below(200) == 0) text += "caf\xC3\xA9 ";
      }
      bytes += text.size();
      texts.push_back(text);
    }
  }
};

__attribute__((noinline)) void Measured(const mvbert::Tokenizer& tokenizer,
                                        const std::vector<std::string_view>& texts,
                                        const mvbert::TextOptions& options,
                                        mvbert::Encoding* encoding) {
  tokenizer.Encode(texts, options, 0, 1, encoding);
}

// What a call of a tokenizer does that asks for offsets. Returns how many ids the texts have.
__attribute__((noinline)) std::size_t MeasuredSpans(const mvbert::Tokenizer& tokenizer,
                                                    const std::vector<std::string_view>& texts) {
  mvbert::RowOptions options;
  options.special = false;
  options.spans = true;
  const mvbert::TokenRows rows(tokenizer, texts, nullptr, options, 1);
  const auto count = static_cast<std::size_t>(rows.offsets().back());
  // (Not vectors, which would be cleared first.)
  const std::unique_ptr<std::int32_t[]> ids(new std::int32_t[count]);
  const std::unique_ptr<std::int32_t[]> spans(new std::int32_t[2 * count]);
  const std::unique_ptr<std::uint8_t[]> types(new std::uint8_t[count]);
  rows.FillFlat(1, ids.get(), types.get());
  mvbert::RowColumns<std::int32_t> columns;
  columns.spans = spans.get();
  rows.FillColumns(1, {}, columns);
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  const World world(argc > 1 ? 200 : 400);
  const std::vector<std::string_view> texts(world.texts.begin(), world.texts.end());
  const auto teacher = std::make_shared<mvbert::WordPiece>(world.teacher_pieces, 1);
  const auto student = std::make_shared<mvbert::WordPiece>(world.student_pieces, 1);
  const mvbert::Tokenizer plain({}, teacher, nullptr, {{"[MASK]", 4, false}, {"[SEP]", 3, false}});
  const mvbert::Tokenizer mixed({}, teacher, student, {});
  mvbert::TextOptions plain_options, mixed_options;
  plain_options.find_special = true;
  mixed_options.coin.threshold = std::uint64_t{1} << 31;
  if (argc > 1) {
    const bool mix = std::strcmp(argv[1], "mixed") == 0;
    mvbert::Encoding first, second;
    (mix ? mixed : plain).Encode(texts, mix ? mixed_options : plain_options, 0, 1, &first);
    std::size_t count = 0;
    if (std::strcmp(argv[1], "spans") == 0) {
      count = MeasuredSpans(plain, texts);
    } else {
      Measured(mix ? mixed : plain, texts, mix ? mixed_options : plain_options, &second);
      count = second.ids.size();
    }
    std::printf("%zu bytes, %zu ids, %s\n", world.bytes, count, mvbert::FastestAsciiRun().name);
    return first.ids.size() == count ? 0 : 1;
  }
  int failures = 0;
  for (const bool mix : {false, true}) {
    const mvbert::Tokenizer& tokenizer = mix ? mixed : plain;
    const mvbert::TextOptions& options = mix ? mixed_options : plain_options;
    for (const int threads : {1, 3}) {
      mvbert::Encoding all;
      tokenizer.Encode(texts, options, 5, threads, &all);
      std::size_t begin = 0;
      for (std::size_t t = 0; t < texts.size(); ++t) {
        mvbert::IdBuffer one;
        tokenizer.EncodeWords(texts[t], options, 5 + t, &one, nullptr);
        failures += one.size() != all.ends[t] - begin ||
                    std::memcmp(one.data(), all.ids.data() + begin, 4 * one.size()) != 0;
        begin = all.ends[t];
      }
    }
  }
  std::printf(failures ? "encode_check: %d texts differ\n" : "encode_check: all texts agree\n",
              failures);
  return failures != 0;
}
