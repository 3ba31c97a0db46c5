// Texts -> rows of ids for a model: truncation, [CLS] and [SEP], padding, as transformers has them.

#ifndef MVBERT_TOKEN_ROWS_H_
#define MVBERT_TOKEN_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "tokenizer.h"

namespace mvbert {

enum class Truncation {
  kNone,
  kLongestFirst,  // a piece at a time from the longer text, from the second where they are equal
  kOnlyFirst,
  kOnlySecond,
};

struct RowOptions {
  bool special = true;  // [CLS] first, [SEP] after each text
  std::int32_t cls = 0;
  std::int32_t sep = 0;
  std::int32_t pad = 0;
  Truncation truncation = Truncation::kNone;
  std::uint64_t max_length = 0;  // of a row, special pieces counted; only for truncation
};

// Texts or pairs of texts, encoded, and the shape of a batch of rows of them.
class TokenRows {
 public:
  // Row i is texts[i] and, unless `pairs` is null, (*pairs)[i]; well-formed UTF-8, read here alone.
  // Special pieces in texts are recognised. Up to `threads` >= 1 threads are used; what comes out
  // does not depend on it. `tokenizer` must outlive the rows.
  //
  // Throws std::invalid_argument if there are not as many pairs as texts, if the special pieces of
  // a row alone are longer than max_length, or if truncating one text of a row is not enough.
  TokenRows(const Tokenizer& tokenizer, const std::vector<std::string_view>& texts,
            const std::vector<std::string_view>* pairs, const RowOptions& options, int threads);
  ~TokenRows();
  TokenRows(const TokenRows&) = delete;
  TokenRows& operator=(const TokenRows&) = delete;

  std::size_t size() const { return offsets_.size() - 1; }
  std::uint64_t longest() const { return longest_; }

  // The width of padded rows: the longest row, or `width` if that is given, rounded up to a
  // multiple of `multiple` >= 1. Throws std::invalid_argument naming the first row that is longer
  // than `width`.
  std::size_t Width(std::optional<std::size_t> width, std::size_t multiple) const;

  // Row i is [offsets()[i], offsets()[i + 1]) of flat rows.
  const std::vector<std::int64_t>& offsets() const { return offsets_; }

  // Writes all rows one after another: ids, and 1 where the second text of a pair and its [SEP] are
  // (0 everywhere without special pieces, as transformers has it).
  void FillFlat(int threads, std::int32_t* ids, std::uint8_t* types) const;

  // Writes rows [size, width], width >= longest(), as Width gives it: ids, types, and 1 where not
  // padded.
  template <typename T>
  void FillPadded(int threads, std::size_t width, T* ids, T* types, T* mask) const;

 private:
  // Calls fill(row) for every row, on up to `threads` threads.
  template <typename Fill>
  void ForEachRow(int threads, Fill&& fill) const;

  // Writes one row's ids and types; returns its length.
  template <typename T, typename Type>
  std::size_t Row(std::size_t row, T* ids, Type* types) const;

  // The ids of a text that stay.
  struct Ids {
    const std::int32_t* begin;
    const std::int32_t* end;
  };
  static std::vector<Ids> AllIds(const std::vector<Encoding>& parts);

  // Cuts rows to max_length and makes offsets_.
  void Shape(bool pairs);

  const Tokenizer& tokenizer_;
  const RowOptions options_;
  std::vector<Encoding> parts_[2];  // of the first texts, of the second
  std::vector<Ids> first_;
  std::vector<Ids> second_;  // of pairs; else empty
  std::vector<std::int64_t> offsets_;
  std::uint64_t longest_ = 0;
};

// Appends one row, not truncated, to *ids; its second text may be null.
void EncodeRow(const Tokenizer& tokenizer, std::string_view text, const std::string_view* pair,
               const RowOptions& options, IdBuffer* ids);

}  // namespace mvbert

#endif  // MVBERT_TOKEN_ROWS_H_
