#include "token_rows.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "share.h"

namespace mvbert {
namespace {

std::uint64_t Begin(const Encoding& encoding, std::size_t i) {
  return i == 0 ? 0 : encoding.ends[i - 1];
}

std::uint64_t Length(const Encoding& encoding, std::size_t i) {
  return encoding.ends[i] - Begin(encoding, i);
}

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
    // The longer is cut down to what the shorter leaves; a piece that does not halve is the first's.
    *second = room - *first;
  } else if (*second <= room / 2) {
    *first = room - *second;
  } else {
    *second = room / 2;
    *first = room - *second;
  }
  return true;
}

}  // namespace

std::uint64_t TokenRows::Limit(const RowOptions& options) {
  // One more than fits says that a text is too long; how much longer changes nothing.
  return options.truncation == Truncation::kNone ? TextOptions().limit : options.max_length + 1;
}

TokenRows::TokenRows(const Encoding& texts, const Encoding* pairs, const RowOptions& options)
    : texts_(texts), pairs_(pairs), options_(options) {
  const std::size_t rows = texts.ends.size();
  const std::uint64_t specials = Specials(options, pairs != nullptr);
  const bool truncate = options.truncation != Truncation::kNone;
  if (truncate && options.max_length < specials) {
    throw std::invalid_argument("max_length " + std::to_string(options.max_length) +
                                " leaves no room for the " + std::to_string(specials) +
                                " special tokens of a row");
  }
  kept_.resize(pairs == nullptr ? rows : 2 * rows);
  offsets_.reserve(rows + 1);
  offsets_.push_back(0);
  for (std::size_t i = 0; i < rows; ++i) {
    std::uint64_t first = Length(texts, i);
    std::uint64_t second = pairs == nullptr ? 0 : Length(*pairs, i);
    if (truncate && !Truncate(options.truncation, options.max_length - specials, &first, &second)) {
      const bool only_first = options.truncation == Truncation::kOnlyFirst;
      throw std::invalid_argument(
          "row " + std::to_string(i) + " cannot be cut to max_length " +
          std::to_string(options.max_length) + " by truncation='" +
          (only_first ? "only_first" : "only_second") +
          "': the other text alone is too long; use 'longest_first'");
    }
    if (std::max(first, second) > std::numeric_limits<std::uint32_t>::max()) {
      throw std::length_error("a text of 2^32 pieces");
    }
    kept_[i] = static_cast<std::uint32_t>(first);
    if (pairs != nullptr) kept_[rows + i] = static_cast<std::uint32_t>(second);
    const std::uint64_t length = first + second + specials;
    longest_ = std::max(longest_, length);
    offsets_.push_back(offsets_.back() + static_cast<std::int64_t>(length));
  }
}

template <typename T, typename Type>
std::size_t TokenRows::Row(std::size_t row, T* ids, Type* types) const {
  T* out = ids;
  if (options_.special) *out++ = options_.cls;
  const std::int32_t* text = texts_.ids.data() + Begin(texts_, row);
  out = std::copy(text, text + kept_[row], out);
  if (options_.special) *out++ = options_.sep;
  const auto first = static_cast<std::size_t>(out - ids);
  if (pairs_ != nullptr) {
    text = pairs_->ids.data() + Begin(*pairs_, row);
    out = std::copy(text, text + kept_[size() + row], out);
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
  ForEachRow(threads, [&](std::size_t row) { Row(row, ids + offsets_[row], types + offsets_[row]); });
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

}  // namespace mvbert
