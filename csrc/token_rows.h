// Encoded texts -> rows for a model: truncation, [CLS] and [SEP], padding, as transformers has them.

#ifndef MVBERT_TOKEN_ROWS_H_
#define MVBERT_TOKEN_ROWS_H_

#include <cstddef>
#include <cstdint>
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

// The shape of a batch of rows, and its filling. The encodings must outlive it.
class TokenRows {
 public:
  // Row i is text i of `texts`' parts and, unless `pairs` is null, text i of pairs'. Throws
  // std::invalid_argument if the special pieces alone are longer than max_length, or if truncating
  // one text of a row is not enough.
  TokenRows(const std::vector<Encoding>& texts, const std::vector<Encoding>* pairs,
            const RowOptions& options);
  TokenRows(const TokenRows&) = delete;
  TokenRows& operator=(const TokenRows&) = delete;

  // How many ids of each text decide all of a row: TextOptions::limit for the encodings.
  static std::uint64_t Limit(const RowOptions& options);

  std::size_t size() const { return offsets_.size() - 1; }
  std::uint64_t longest() const { return longest_; }

  // Row i is [offsets()[i], offsets()[i + 1]) of flat rows.
  const std::vector<std::int64_t>& offsets() const { return offsets_; }

  // Writes all rows one after another: ids, and 1 where the second text of a pair and its [SEP] are
  // (0 everywhere without special pieces, as transformers has it).
  void FillFlat(int threads, std::int32_t* ids, std::uint8_t* types) const;

  // Writes rows [size, width], width >= longest(): ids, types, and 1 where not padded.
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

  const RowOptions options_;
  std::vector<Ids> first_;
  std::vector<Ids> second_;  // of pairs; else empty
  std::vector<std::int64_t> offsets_;
  std::uint64_t longest_ = 0;
};

}  // namespace mvbert

#endif  // MVBERT_TOKEN_ROWS_H_
