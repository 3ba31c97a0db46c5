// Widths and single rows of TokenRows, and special pieces, by literal expectation. Exit status 0 if
// all is well. (That rows are the same flat, padded, cut and one by one is the property of
// rows_fuzz.cc.)

#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "special_pieces.h"
#include "token_rows.h"
#include "tokenizer.h"
#include "wordpiece.h"

namespace {

using namespace mvbert;

int failures = 0;

void Require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "rows_check: %s\n", what);
  ++failures;
}

// The message of the std::invalid_argument that `call` throws; empty if it throws none.
std::string Refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

enum { kPad, kUnk, kCls, kSep, kMask, kA, kB };

void CheckRows() {
  const auto pieces = std::make_shared<WordPiece>(
      std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"}, kUnk);
  const Tokenizer tokenizer({}, pieces, nullptr, {{"[MASK]", kMask, false}});
  RowOptions options;
  options.cls = kCls;
  options.sep = kSep;
  const std::vector<std::string_view> texts = {"a", "a b [MASK]", ""}, pairs = {"b", "", "a"};
  const TokenRows rows(tokenizer, texts, nullptr, options, 1);
  Require(rows.offsets() == std::vector<std::int64_t>{0, 3, 8, 10}, "wrong lengths of rows");
  Require(rows.Width({}, 1) == 5 && rows.Width({}, 4) == 8 && rows.Width({}, 5) == 5,
          "the width is not that of the longest row, rounded up");
  Require(rows.Width(7, 1) == 7 && rows.Width(7, 8) == 8 && rows.Width(5, 1) == 5,
          "the width is not the one asked for, rounded up");
  Require(Refusal([&] { rows.Width(4, 8); }) ==
              "row 1 has 5 pieces, more than max_length 4; pass truncation=True",
          "a row longer than the width was not named");
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  Require(rows.Width(kMost, 1) == kMost && rows.Width(kMost - 7, 8) == kMost - 7 &&
              !Refusal([&] { rows.Width(kMost, 8); }).empty(),
          "a width was rounded up past the largest number");
  Require(Refusal([&] { TokenRows(tokenizer, texts, &texts, options, 0); }) ==
              "threads must be at least 1, got 0",
          "no threads were taken");
  const std::vector<std::string_view> fewer = {"b"};
  Require(Refusal([&] { TokenRows(tokenizer, texts, &fewer, options, 1); }) ==
              "there are 3 texts and 1 pairs",
          "texts without a pair were taken");

  IdBuffer ids;
  EncodeRow(tokenizer, texts[1], nullptr, options, &ids);
  EncodeRow(tokenizer, texts[0], &pairs[0], options, &ids);
  options.special = false;
  EncodeRow(tokenizer, texts[0], &pairs[0], options, &ids);
  Require(
      std::vector<std::int32_t>(ids.data(), ids.end()) ==
          std::vector<std::int32_t>{kCls, kA, kB, kMask, kSep, kCls, kA, kSep, kB, kSep, kA, kB},
      "wrong single rows");
}

std::vector<std::int32_t> WordsOf(const TokenRows& rows) {
  std::vector<std::int32_t> words(static_cast<std::size_t>(rows.offsets().back()));
  RowColumns<std::int32_t> columns;
  columns.words = words.data();
  rows.FillColumns(2, std::nullopt, columns);
  return words;
}

// The words of rows, whose texts may be given as words.
void CheckWords() {
  const auto pieces = std::make_shared<WordPiece>(
      std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"}, kUnk);
  const Tokenizer tokenizer({}, pieces, nullptr, {});
  RowOptions options;
  options.cls = kCls;
  options.sep = kSep;
  const std::vector<std::string_view> texts = {"ab", "a", "a"}, none = {};
  using Ends = std::vector<std::uint64_t>;
  const auto refusal = [&](const Ends& first, const Ends* second) {
    options.words[0] = &first;
    options.words[1] = second;
    return Refusal([&] { TokenRows(tokenizer, texts, nullptr, options, 1); });
  };
  const std::string refused = "where the words of each text end must ascend to their number, 3";
  Require(refusal({1, 3}, nullptr).empty() && refusal({0, 3, 3}, nullptr).empty(),
          "words of samples were refused");
  Require(refusal({1, 2}, nullptr) == refused && refusal({4}, nullptr) == refused &&
              refusal({3, 1, 3}, nullptr) == refused && refusal({}, nullptr) == refused,
          "words that are not those of the samples were taken");
  const Ends pair_ends = {1};
  Require(
      refusal({3}, &pair_ends) == "where the words of each pair end must ascend to their number, 0",
      "words of pairs were taken without pairs");

  // [CLS] a ##b [SEP] a [SEP], [CLS] a [SEP] [SEP]: of texts, and of texts in words.
  const std::vector<std::string_view> firsts = {"ab", "a"}, seconds = {"a", ""};
  const Ends first_ends = {0, 3}, second_ends = {0, 0};
  for (const bool keep : {false, true}) {
    RowOptions whole = options;
    whole.words[0] = whole.words[1] = nullptr;
    whole.keep = keep;
    Require(WordsOf(TokenRows(tokenizer, firsts, &seconds, whole, 2)) ==
                std::vector<std::int32_t>{-1, 0, 0, -1, 0, -1, -1, 0, -1, -1},
            "wrong words of texts");
    whole.words[0] = &first_ends;
    whole.words[1] = &second_ends;
    Require(WordsOf(TokenRows(tokenizer, texts, &none, whole, 2)) ==
                std::vector<std::int32_t>{-1, -1, -1, -1, 0, 0, 1, 2, -1, -1},
            "wrong words of words");
  }
}

// Rows that are cut, of one text alone: something of it stays unless nothing fits.
void CheckCuts() {
  const auto pieces = std::make_shared<WordPiece>(
      std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"}, kUnk);
  const Tokenizer tokenizer({}, pieces, nullptr, {});
  const std::vector<std::string_view> texts = {"a a"}, pairs = {"b b"};
  for (const Truncation truncation : {Truncation::kOnlyFirst, Truncation::kOnlySecond}) {
    RowOptions options;
    options.truncation = truncation;
    const auto lengths = [&](std::uint64_t max_length) {
      options.max_length = max_length;
      return TokenRows(tokenizer, texts, &pairs, options, 1).offsets();
    };
    Require(lengths(3)[1] == 3 && lengths(6)[1] == 6 && lengths(7)[1] == 7, "wrong cuts");
    for (const std::uint64_t max_length : {4, 5}) {
      Require(Refusal([&] { lengths(max_length); }).find("nothing of that text would be left") !=
                  std::string::npos,
              "a text was cut to nothing");
    }
  }
}

using Found = std::vector<std::pair<std::string, std::int32_t>>;

Found Split(const SpecialPieces& pieces, std::string_view text) {
  Found all;
  pieces.Split(text, [&](std::string_view part, std::int32_t id) {
    all.emplace_back(part, id);
    return true;
  });
  return all;
}

void CheckSpecialPieces() {
  const WordSplitter uncased({true, true}), cased({false, true});
  const SpecialPieces written(
      {{"[A]", 1, false}, {"[A]]", 2, false}, {"<b>", 3, false}, {"[A]", 4, false}}, uncased, 9);
  Require(Split(written, "x[A]]y[A]<b>[A") ==
              Found{{"x", -1}, {"[A]]", 2}, {"y", -1}, {"[A]", 1}, {"<b>", 3}, {"[A", -1}},
          "not the leftmost and longest special pieces");
  Require(Split(written, "").empty(), "a stretch of an empty text");
  const SpecialPieces cleaned({{"[A]", 1, false}}, cased, 9);
  Require(Split(cleaned, "[\u200BA] [A\u200B]x") == Found{{"[\u200BA]", 1}, {" [A\u200B]x", -1}},
          "not the special pieces that cleaning makes");
  const SpecialPieces normalized(
      {{"[A]", 1, false}, {"\u00C9a", 2, true}, {"eab", 3, true}, {"\u0301", 4, true}}, uncased, 9);
  Require(
      Split(normalized, "xE\u0301AbEa[A]\u00E9a\u0301") ==
          Found{{"x", -1}, {"E\u0301Ab", 3}, {"Ea", 2}, {"[A]", 1}, {"\u00E9a", 2}, {"\u0301", -1}},
      "not the normalised pieces");
  Require(Split(normalized, "\u0301ea e") == Found{{"\u0301", -1}, {"ea", 2}, {" e", -1}},
          "a normalised piece begins with a deleted character");
  Require(Split(SpecialPieces({}, cased, 0), "[A]") == Found{{"[A]", -1}},
          "a piece that there is not");
  Require(!Refusal([&] { SpecialPieces({{"a b", 1, false}}, cased, 9); }).empty() &&
              !Refusal([&] { SpecialPieces({{"", 1, false}}, cased, 9); }).empty() &&
              !Refusal([&] { SpecialPieces({{"a", 9, false}}, cased, 9); }).empty() &&
              !Refusal([&] { SpecialPieces({{"a", -1, false}}, cased, 9); }).empty(),
          "a special piece that cannot be was taken");
}

}  // namespace

int main() {
  CheckRows();
  CheckWords();
  CheckCuts();
  CheckSpecialPieces();
  if (failures == 0) std::puts("rows_check: all rows and special pieces are right");
  return failures != 0;
}
