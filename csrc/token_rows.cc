#include "token_rows.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "share.h"

namespace mvbert {
namespace {

std::uint64_t Specials(const RowOptions& options, bool pairs) {
  return options.special ? (pairs ? 3 : 2) : 0;
}

// Shortens a row's texts to `room` ids together; false if `truncation` cannot.
bool Truncate(Truncation truncation, std::uint64_t room, std::uint64_t* first,
              std::uint64_t* second) {
  if (*first + *second <= room) return true;
  const std::uint64_t excess = *first + *second - room;
  if (truncation == Truncation::kOnlyFirst) {
    if (excess > *first) return false;
    *first -= excess;
  } else if (truncation == Truncation::kOnlySecond) {
    if (excess > *second) return false;
    *second -= excess;
  } else if (*first <= room / 2) {
    // The longer is cut down to what the shorter leaves; a piece that does not halve is the
    // first's.
    *second = room - *first;
  } else if (*second <= room / 2) {
    *first = room - *second;
  } else {
    *second = room / 2;
    *first = room - *second;
  }
  return true;
}

// How many ids of each text decide all of a row: one more than fits says that a text is too long;
// how much longer changes nothing.
std::uint64_t Limit(const RowOptions& options) {
  if (options.truncation == Truncation::kNone) return TextOptions().limit;
  return std::max(options.max_length, options.max_length + 1);  // (2^64 is 0)
}

}  // namespace

std::vector<TokenRows::Ids> TokenRows::AllIds(const std::vector<Encoding>& parts) {
  std::vector<Ids> texts;
  std::size_t count = 0;
  for (const Encoding& part : parts) count += part.ends.size();
  texts.reserve(count);
  for (const Encoding& part : parts) {
    const std::int32_t* begin = part.ids.data();
    for (const std::uint64_t end : part.ends) {
      texts.push_back({begin, part.ids.data() + end});
      begin = texts.back().end;
    }
  }
  return texts;
}

TokenRows::TokenRows(const Tokenizer& tokenizer, const std::vector<std::string_view>& texts,
                     const std::vector<std::string_view>* pairs, const RowOptions& options,
                     int threads)
    : tokenizer_(tokenizer), options_(options) {
  if (pairs != nullptr && pairs->size() != texts.size()) {
    throw std::invalid_argument("there are " + std::to_string(texts.size()) + " texts and " +
                                std::to_string(pairs->size()) + " pairs");
  }
  TextOptions text_options;
  text_options.find_special = true;
  text_options.limit = Limit(options);
  tokenizer.EncodeParts(texts, text_options, 0, threads, &parts_[0]);
  first_ = AllIds(parts_[0]);
  if (pairs != nullptr) {
    tokenizer.EncodeParts(*pairs, text_options, 0, threads, &parts_[1]);
    second_ = AllIds(parts_[1]);
  }
  Shape(pairs != nullptr);
}

TokenRows::~TokenRows() {
  for (std::vector<Encoding>& parts : parts_) tokenizer_.Recycle(&parts);
}

void TokenRows::Shape(bool pairs) {
  const RowOptions& options = options_;
  const std::uint64_t specials = Specials(options, pairs);
  const bool truncate = options.truncation != Truncation::kNone;
  if (truncate && options.max_length < specials) {
    throw std::invalid_argument("max_length " + std::to_string(options.max_length) +
                                " leaves no room for the " + std::to_string(specials) +
                                " special tokens of a row");
  }
  offsets_.reserve(first_.size() + 1);
  offsets_.push_back(0);
  for (std::size_t i = 0; i < first_.size(); ++i) {
    auto first = static_cast<std::uint64_t>(first_[i].end - first_[i].begin);
    auto second =
        pairs ? static_cast<std::uint64_t>(second_[i].end - second_[i].begin) : std::uint64_t{0};
    if (truncate && !Truncate(options.truncation, options.max_length - specials, &first, &second)) {
      const bool only_first = options.truncation == Truncation::kOnlyFirst;
      throw std::invalid_argument("row " + std::to_string(i) + " cannot be cut to max_length " +
                                  std::to_string(options.max_length) + " by truncation='" +
                                  (only_first ? "only_first" : "only_second") +
                                  "': the other text alone is too long; use 'longest_first'");
    }
    first_[i].end = first_[i].begin + first;
    if (pairs) second_[i].end = second_[i].begin + second;
    const std::uint64_t length = first + second + specials;
    longest_ = std::max(longest_, length);
    offsets_.push_back(offsets_.back() + static_cast<std::int64_t>(length));
  }
}

std::size_t TokenRows::Width(std::optional<std::size_t> width, std::size_t multiple) const {
  if (width && longest_ > *width) {
    std::size_t row = 0;
    while (static_cast<std::size_t>(offsets_[row + 1] - offsets_[row]) <= *width) ++row;
    throw std::invalid_argument(
        "row " + std::to_string(row) + " has " + std::to_string(offsets_[row + 1] - offsets_[row]) +
        " pieces, more than max_length " + std::to_string(*width) + "; pass truncation=True");
  }
  const std::size_t least = width.value_or(longest_), over = least % multiple;
  if (over == 0) return least;
  if (least > std::numeric_limits<std::size_t>::max() - multiple) {
    throw std::invalid_argument("max_length " + std::to_string(least) +
                                " cannot be rounded up to a multiple of " +
                                std::to_string(multiple));
  }
  return least - over + multiple;
}

template <typename T, typename Type>
std::size_t TokenRows::Row(std::size_t row, T* ids, Type* types) const {
  T* out = ids;
  if (options_.special) *out++ = options_.cls;
  out = std::copy(first_[row].begin, first_[row].end, out);
  if (options_.special) *out++ = options_.sep;
  const auto first = static_cast<std::size_t>(out - ids);
  if (!second_.empty()) {
    out = std::copy(second_[row].begin, second_[row].end, out);
    if (options_.special) *out++ = options_.sep;
  }
  const auto length = static_cast<std::size_t>(out - ids);
  std::fill(types, types + first, Type{0});
  std::fill(types + first, types + length, static_cast<Type>(options_.special));
  return length;
}

template <typename Fill>
void TokenRows::ForEachRow(int threads, Fill&& fill) const {
  constexpr std::size_t kRows = 512;  // a thread takes at once
  Share((size() + kRows - 1) / kRows, threads, [&](auto&& next) {
    for (std::size_t part; next(&part);) {
      const std::size_t end = std::min(size(), (part + 1) * kRows);
      for (std::size_t row = part * kRows; row < end; ++row) fill(row);
    }
  });
}

void TokenRows::FillFlat(int threads, std::int32_t* ids, std::uint8_t* types) const {
  ForEachRow(threads,
             [&](std::size_t row) { Row(row, ids + offsets_[row], types + offsets_[row]); });
}

template <typename T>
void TokenRows::FillPadded(int threads, std::size_t width, T* ids, T* types, T* mask) const {
  ForEachRow(threads, [&](std::size_t row) {
    T* const row_ids = ids + row * width;
    T* const row_types = types + row * width;
    T* const row_mask = mask + row * width;
    const std::size_t length = Row(row, row_ids, row_types);
    std::fill(row_ids + length, row_ids + width, static_cast<T>(options_.pad));
    std::fill(row_types + length, row_types + width, T{0});
    std::fill(row_mask, row_mask + length, T{1});
    std::fill(row_mask + length, row_mask + width, T{0});
  });
}

template void TokenRows::FillPadded(int, std::size_t, std::int32_t*, std::int32_t*,
                                    std::int32_t*) const;
template void TokenRows::FillPadded(int, std::size_t, std::int64_t*, std::int64_t*,
                                    std::int64_t*) const;

void EncodeRow(const Tokenizer& tokenizer, std::string_view text, const std::string_view* pair,
               const RowOptions& options, IdBuffer* ids) {
  TextOptions text_options;
  text_options.find_special = true;
  if (options.special) ids->Append(&options.cls, 1);
  for (const std::string_view* each : {static_cast<const std::string_view*>(&text), pair}) {
    if (each == nullptr) continue;
    tokenizer.EncodeWords(*each, text_options, 0, ids, nullptr);
    if (options.special) ids->Append(&options.sep, 1);
  }
}

}  // namespace mvbert
