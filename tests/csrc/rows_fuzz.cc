// libFuzzer: batches of texts and pairs become the same rows flat, padded, cut short and one by
// one.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "token_rows.h"
#include "tokenizer_fuzz.h"

namespace mvbert {
namespace {

constexpr std::int32_t kCls = 2, kSep = 3, kPad = 0;

std::vector<std::int32_t> Ids(const Tokenizer& tokenizer, std::string_view text) {
  TextOptions options;
  options.find_special = true;
  IdBuffer ids;
  tokenizer.EncodeWords(text, options, 0, &ids, nullptr);
  return {ids.data(), ids.end()};
}

// transformers' truncation, a piece at a time; false where it fails.
bool CutSlowly(Truncation truncation, std::size_t room, std::vector<std::int32_t>* first,
               std::vector<std::int32_t>* second) {
  if (room == 0) {
    first->clear();
    second->clear();
  }
  const bool longest =
      truncation != Truncation::kOnlyFirst && truncation != Truncation::kOnlySecond;
  while (first->size() + second->size() > room) {
    auto* from = truncation == Truncation::kOnlyFirst    ? first
                 : truncation == Truncation::kOnlySecond ? second
                 : first->size() > second->size()        ? first
                                                         : second;
    if (from->empty()) return false;
    from->pop_back();
    if (from->empty() && !longest) return false;
  }
  return true;
}

void CheckRows(const Tokenizer& tokenizer, const std::vector<std::string_view>& texts,
               const std::vector<std::string_view>* pairs, const RowOptions& options, int threads) {
  const std::size_t specials = options.special ? (pairs != nullptr ? 3 : 2) : 0;
  bool possible = options.truncation == Truncation::kNone || options.max_length >= specials;
  std::vector<std::vector<std::int32_t>> rows;
  std::vector<std::size_t> seconds;  // where the second text begins
  for (std::size_t i = 0; possible && i < texts.size(); ++i) {
    std::vector<std::int32_t> first = Ids(tokenizer, texts[i]), second;
    if (pairs != nullptr) second = Ids(tokenizer, (*pairs)[i]);
    if (options.truncation != Truncation::kNone) {
      possible = CutSlowly(options.truncation, options.max_length - specials, &first, &second);
    }
    std::vector<std::int32_t>& row = rows.emplace_back();
    if (options.special) row.push_back(options.cls);
    row.insert(row.end(), first.begin(), first.end());
    if (options.special) row.push_back(options.sep);
    seconds.push_back(row.size());
    row.insert(row.end(), second.begin(), second.end());
    if (options.special && pairs != nullptr) row.push_back(options.sep);
  }
  std::optional<TokenRows> made;
  try {
    made.emplace(tokenizer, texts, pairs, options, threads);
  } catch (const std::invalid_argument&) {
    Require(!possible, "rows were refused");
    return;
  }
  Require(possible, "rows that cannot be cut were taken");
  Require(made->size() == texts.size(), "another number of rows");
  const auto total = static_cast<std::size_t>(made->offsets().back());
  std::vector<std::int32_t> ids(total);
  std::vector<std::uint8_t> types(total);
  made->FillFlat(threads, ids.data(), types.data());
  // (Padded, many short rows beside a long one are more memory than there is.)
  std::size_t width = made->Width(made->longest() + 1, 3);
  Require(width % 3 == 0 && width > made->longest() && width <= made->longest() + 3, "the width");
  if (width > (std::size_t{1} << 22) / rows.size()) width = 0;
  std::vector<std::int64_t> padded(texts.size() * width), padded_types(padded), mask(padded);
  if (width > 0) {
    made->FillPadded(threads, width, padded.data(), padded_types.data(), mask.data());
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto begin = static_cast<std::size_t>(made->offsets()[i]);
    const auto end = static_cast<std::size_t>(made->offsets()[i + 1]);
    Require(end - begin == rows[i].size(), "a row of another length");
    const auto type_of = [&](std::size_t j) { return options.special && j >= seconds[i]; };
    for (std::size_t j = 0; j < rows[i].size(); ++j) {
      Require(ids[begin + j] == rows[i][j] && types[begin + j] == type_of(j), "another flat id");
    }
    for (std::size_t j = 0; j < width; ++j) {
      const bool inside = j < rows[i].size();
      Require(padded[i * width + j] == (inside ? rows[i][j] : options.pad), "another padded id");
      Require(padded_types[i * width + j] == (inside && type_of(j)), "another padded type");
      Require(mask[i * width + j] == inside, "another mask");
    }
  }
  if (options.truncation == Truncation::kNone) {
    IdBuffer row;
    EncodeRow(tokenizer, texts[0], pairs != nullptr ? &(*pairs)[0] : nullptr, options, &row);
    Require(std::vector<std::int32_t>(row.data(), row.end()) == rows[0], "another row by itself");
  }
}

}  // namespace
}  // namespace mvbert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mvbert;
  const auto& [uncased, cased, accented] = AllFuzzTokenizers();
  FuzzInput input(data, size);
  const std::uint8_t flags = input.Byte();
  RowOptions options;
  options.special = (flags & 1) != 0;
  options.cls = kCls;
  options.sep = kSep;
  options.pad = kPad;
  options.truncation = static_cast<Truncation>(flags >> 1 & 3);
  options.max_length = input.Number(0, 40);
  const std::string text = input.Utf8Text();
  const TimeLimit limit(text);
  std::vector<std::string_view> texts;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    texts.push_back(std::string_view(text).substr(at, end - at));
    at = end + 1;
  }
  const std::vector<std::string_view> pairs(texts.rbegin(), texts.rend());
  const bool with_pairs = (flags & 8) != 0;
  if (!with_pairs && options.truncation == Truncation::kOnlySecond) return 0;
  const FuzzTokenizers& all = (flags & 64) != 0 ? accented : (flags & 16) != 0 ? uncased : cased;
  CheckRows(all.mixed, texts, with_pairs ? &pairs : nullptr, options, (flags & 32) != 0 ? 2 : 1);
  return 0;
}
