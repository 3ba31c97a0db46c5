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

// Shortens a row's texts to `room` ids together; false if `truncation` cannot: one text alone is
// cut only if something of it stays. (Where nothing fits nothing stays, as Hugging Face has it.)
bool Truncate(Truncation truncation, std::uint64_t room, std::uint64_t* first,
              std::uint64_t* second) {
  if (*first + *second <= room) return true;
  const std::uint64_t excess = *first + *second - room;
  if (room == 0) {
    *first = *second = 0;
  } else if (truncation == Truncation::kOnlyFirst) {
    if (excess >= *first) return false;
    *first -= excess;
  } else if (truncation == Truncation::kOnlySecond) {
    if (excess >= *second) return false;
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

// The same where both texts of a pair overflow: a piece that does not halve is the longer text's,
// the second's where they are equal.
void TruncateToOverflow(std::uint64_t room, std::uint64_t* first, std::uint64_t* second) {
  if (*first + *second <= room) return;
  std::uint64_t* const shorter = *first > *second ? second : first;
  std::uint64_t* const longer = *first > *second ? first : second;
  *shorter = std::min(*shorter, room / 2);
  *longer = room - *shorter;
}

// How many ids of each text decide all of a row: one more than fits says that a text is too long;
// how much longer changes nothing.
std::uint64_t Limit(const RowOptions& options) {
  if (options.truncation == Truncation::kNone || options.overflow) return TextOptions().limit;
  return std::max(options.max_length, options.max_length + 1);  // (2^64 is 0)
}

// RowOptions::words of so many texts.
void CheckWords(const std::vector<std::uint64_t>* ends, std::size_t texts, const char* what) {
  if (ends == nullptr) return;
  if (!std::is_sorted(ends->begin(), ends->end()) || (ends->empty() ? 0 : ends->back()) != texts) {
    throw std::invalid_argument("where the words of each " + std::string(what) +
                                " end must ascend to their number, " + std::to_string(texts));
  }
}

}  // namespace

std::vector<TokenRows::Ids> TokenRows::AllIds(const std::vector<Encoding>& parts,
                                              const std::vector<std::uint64_t>* words) {
  std::vector<Ids> texts;
  std::size_t count = 0;
  for (const Encoding& part : parts) count += part.ends.size();
  texts.reserve(words != nullptr ? words->size() : count);
  std::uint64_t before = 0;  // words of the parts so far
  std::size_t first = 0;     // of the part's words
  auto part = parts.begin();
  for (const std::uint64_t row_end : words != nullptr ? *words : std::vector<std::uint64_t>()) {
    while (first == part->ends.size() && part + 1 != parts.end() && row_end > before + first) {
      before += first;
      first = 0;
      ++part;
    }
    const auto end = static_cast<std::size_t>(row_end - before);
    const std::int32_t* const ids = part->ids.data();
    texts.push_back({ids + (first == 0 ? 0 : part->ends[first - 1]),
                     ids + (end == 0 ? 0 : part->ends[end - 1]), &*part, first});
    first = end;
  }
  if (words != nullptr) return texts;
  for (const Encoding& each : parts) {
    const std::int32_t* begin = each.ids.data();
    for (std::size_t i = 0; i < each.ends.size(); ++i) {
      texts.push_back({begin, each.ids.data() + each.ends[i], &each, i});
      begin = texts.back().end;
    }
  }
  return texts;
}

TokenRows::TokenRows(const Tokenizer& tokenizer, const std::vector<std::string_view>& texts,
                     const std::vector<std::string_view>* pairs, const RowOptions& options,
                     int threads)
    : tokenizer_(tokenizer), options_(options) {
  CheckWords(options.words[0], texts.size(), "text");
  CheckWords(options.words[1], pairs == nullptr ? 0 : pairs->size(), "pair");
  const auto count = [&](int which, const std::vector<std::string_view>& list) {
    return options.words[which] == nullptr ? list.size() : options.words[which]->size();
  };
  if (pairs != nullptr && count(1, *pairs) != count(0, texts)) {
    throw std::invalid_argument("there are " + std::to_string(count(0, texts)) + " texts and " +
                                std::to_string(count(1, *pairs)) + " pairs");
  }
  TextOptions text_options;
  text_options.find_special = true;
  text_options.limit = Limit(options);
  text_options.spans = options.spans;
  for (int which = 0; which < (pairs == nullptr ? 1 : 2); ++which) {
    tokenizer.EncodeParts(which == 0 ? texts : *pairs, text_options, 0, threads, &parts_[which],
                          options.words[which]);
    if (options.keep) tokenizer.Shrink(&parts_[which]);
    texts_[which] = AllIds(parts_[which], options.words[which]);
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
  const std::uint64_t room = options.max_length - specials;
  std::vector<Ids>& firsts = texts_[0];
  std::vector<Ids>& seconds = texts_[1];
  offsets_.reserve(firsts.size() + 1);
  offsets_.push_back(0);
  const auto add = [&](std::uint64_t length) {
    longest_ = std::max(longest_, length);
    offsets_.push_back(offsets_.back() + static_cast<std::int64_t>(length));
  };
  for (std::size_t i = 0; i < firsts.size(); ++i) {
    std::uint64_t keep[2] = {firsts[i].size(), pairs ? seconds[i].size() : 0};
    bool possible = true;
    if (truncate && options.overflow && options.truncation == Truncation::kLongestFirst && pairs) {
      TruncateToOverflow(room, &keep[0], &keep[1]);
    } else if (truncate) {
      possible = Truncate(options.truncation, room, &keep[0], &keep[1]);
    }
    if (!possible) {
      const bool only_first = options.truncation == Truncation::kOnlyFirst;
      throw std::invalid_argument("row " + std::to_string(i) + " cannot be cut to max_length " +
                                  std::to_string(options.max_length) + " by truncation='" +
                                  (only_first ? "only_first" : "only_second") +
                                  "': nothing of that text would be left; use 'longest_first'");
    }
    if (options.overflow) {
      const std::size_t before = windows_.size();
      AddWindows(i, keep);
      for (std::size_t w = before; w < windows_.size(); ++w) {
        add(windows_[w].size[0] + windows_[w].size[1] + specials);
      }
      continue;
    }
    firsts[i].end = firsts[i].begin + keep[0];
    if (pairs) seconds[i].end = seconds[i].begin + keep[1];
    add(keep[0] + keep[1] + specials);
  }
}

void TokenRows::AddWindows(std::size_t sample, const std::uint64_t keep[2]) {
  struct Stretch {
    std::size_t begin;
    std::size_t size;
    std::int32_t word;
  };
  std::vector<Stretch> stretches[2];
  for (int which = 0; which < 2; ++which) {
    const bool has = !texts_[which].empty();
    const std::size_t size = has ? texts_[which][sample].size() : 0;
    const auto most = static_cast<std::size_t>(keep[which]);
    stretches[which].push_back({0, most, -1});
    if (most == size) continue;
    if (most == 0) {  // what does not fit is one row, whole
      stretches[which].push_back({0, size, -1});
      continue;
    }
    if (options_.stride >= most) {
      throw std::invalid_argument("stride is " + std::to_string(options_.stride) + ", but row " +
                                  std::to_string(sample) + " has room for " + std::to_string(most) +
                                  " pieces of its " + (which == 0 ? "first" : "second") +
                                  " text: the stride must be less");
    }
    const Ids& ids = texts_[which][sample];
    std::int32_t word = -1;
    for (std::size_t begin = 0, counted = 0; begin + most < size;) {
      begin += most - options_.stride;
      for (; counted < begin; ++counted) {
        word += tokenizer_.begins_word()[static_cast<std::size_t>(ids.begin[counted])];
      }
      stretches[which].push_back({begin, std::min(most, size - begin), word});
    }
  }
  const auto add = [&](std::size_t first, std::size_t second) {
    const Stretch &a = stretches[0][first], &b = stretches[1][second];
    windows_.push_back({sample, {a.begin, b.begin}, {a.size, b.size}, {a.word, b.word}});
  };
  add(0, 0);
  for (std::size_t first = 1; first < stretches[0].size(); ++first) {
    for (std::size_t second = 0; second < stretches[1].size(); ++second) add(first, second);
  }
  for (std::size_t second = 1; second < stretches[1].size(); ++second) add(0, second);
}

TokenRows::Window TokenRows::WindowOf(std::size_t row) const {
  if (!windows_.empty()) return windows_[row];
  return {row,
          {0, 0},
          {texts_[0][row].size(), texts_[1].empty() ? 0 : texts_[1][row].size()},
          {-1, -1}};
}

std::size_t TokenRows::text_size(std::size_t row, int which) const {
  if (!windows_.empty()) return windows_[row].size[which];
  return texts_[which].empty() ? 0 : texts_[which][row].size();
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

template <typename T, typename Type>
std::size_t TokenRows::Row(std::size_t row, T* ids, Type* types) const {
  const Window window = WindowOf(row);
  T* out = ids;
  if (options_.special) *out++ = options_.cls;
  const auto copy = [&](int which) {
    const std::int32_t* const from = texts_[which][window.sample].begin + window.begin[which];
    out = std::copy(from, from + window.size[which], out);
    if (options_.special) *out++ = options_.sep;
  };
  copy(0);
  const auto first = static_cast<std::size_t>(out - ids);
  if (!texts_[1].empty()) copy(1);
  const auto length = static_cast<std::size_t>(out - ids);
  std::fill(types, types + first, Type{0});
  std::fill(types + first, types + length, static_cast<Type>(options_.special));
  return length;
}

std::int32_t* TokenRows::Words(const Window& window, int which, std::int32_t* out) const {
  const Ids& ids = texts_[which][window.sample];
  const std::int32_t* const begin = ids.begin + window.begin[which];
  const std::int32_t* const end = begin + window.size[which];
  if (options_.words[which] == nullptr) {
    std::int32_t word = window.word[which];
    for (const std::int32_t* id = begin; id < end; ++id) {
      word += tokenizer_.begins_word()[static_cast<std::size_t>(*id)];
      *out++ = word;
    }
    return out;
  }
  const std::int32_t* const base = ids.part->ids.data();
  const auto first = ids.part->ends.begin() + static_cast<std::ptrdiff_t>(ids.first);
  auto word =
      std::upper_bound(first, ids.part->ends.end(), static_cast<std::uint64_t>(begin - base));
  for (const std::int32_t* id = begin; id < end; ++id) {
    while (*word <= static_cast<std::uint64_t>(id - base)) ++word;
    *out++ = static_cast<std::int32_t>(word - first);
  }
  return out;
}

void TokenRows::FillWords(std::size_t row, std::int32_t* words) const {
  const Window window = WindowOf(row);
  const auto special = [&] {
    if (options_.special) *words++ = -1;
  };
  special();
  for (int which = 0; which < (texts_[1].empty() ? 1 : 2); ++which) {
    words = Words(window, which, words);
    special();
  }
}

template <typename T>
void TokenRows::FillColumns(int threads, std::optional<std::size_t> width,
                            const RowColumns<T>& columns) const {
  const std::size_t lead = options_.special ? 1 : 0;
  ForEachRow(threads, [&](std::size_t row) {
    const Window window = WindowOf(row);
    const auto at = width ? row * *width : static_cast<std::size_t>(offsets_[row]);
    const std::size_t end = width ? *width : static_cast<std::size_t>(offsets_[row + 1]) - at;
    const int texts = texts_[1].empty() ? 1 : 2;
    if (columns.spans != nullptr) {
      T* const spans = columns.spans + 2 * at;
      std::size_t to = 2 * lead;
      std::fill(spans, spans + to, T{0});
      for (int which = 0; which < texts; ++which) {
        const Ids& ids = texts_[which][window.sample];
        const std::int32_t* const from =
            ids.part->spans.data() +
            2 * (static_cast<std::size_t>(ids.begin - ids.part->ids.data()) + window.begin[which]);
        std::copy(from, from + 2 * window.size[which], spans + to);
        to += 2 * window.size[which];
        std::fill(spans + to, spans + to + 2 * lead, T{0});
        to += 2 * lead;
      }
      std::fill(spans + to, spans + 2 * end, T{0});
    }
    if (columns.special != nullptr) {
      T* const special = columns.special + at;
      std::fill(special, special + end, T{1});
      std::size_t to = lead;
      for (int which = 0; which < texts; ++which) {
        std::fill(special + to, special + to + window.size[which], T{0});
        to += window.size[which] + lead;
      }
    }
    if (columns.words != nullptr) FillWords(row, columns.words + offsets_[row]);
  });
}

template void TokenRows::FillColumns(int, std::optional<std::size_t>,
                                     const RowColumns<std::int32_t>&) const;
template void TokenRows::FillColumns(int, std::optional<std::size_t>,
                                     const RowColumns<std::int64_t>&) const;

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
