// Texts -> rows of ids for a model: truncation, [CLS] and [SEP], padding, as transformers has them.
//
// Every loop ends: each runs once over texts, rows or ids that are there before it begins, and of a
// text that overflows each window begins at least one id after the last, since a stride that leaves
// no room for another is refused.

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
  // What truncation cuts off makes further rows of the same sample, as Hugging Face's fast
  // tokenizers have them; each repeats the last `stride` ids of the one before. (Cutting both texts
  // of a pair to an odd number of ids, they leave the odd one to the longer, or to the second.)
  bool overflow = false;
  std::uint64_t stride = 0;
  bool spans = false;
  bool keep = false;  // the rows are to live long: they hold no more memory than they need
  // If not null, texts are words that stand by themselves: sample i has words up to (*words[0])[i];
  // words[1] says the same of pairs.
  const std::vector<std::uint64_t>* words[2] = {nullptr, nullptr};
};

// Further columns of rows; null where not wanted. Special pieces and padding have the span (0, 0),
// are 1 in `special`, and belong to word -1. Words are never padded.
template <typename T>
struct RowColumns {
  T* spans = nullptr;             // two a piece; needs RowOptions::spans
  T* special = nullptr;           // 1 where the row has it from RowOptions, not from a text
  std::int32_t* words = nullptr;  // number of the word in its text, as split or as given
};

// Texts or pairs of texts, encoded, and the shape of a batch of rows of them.
class TokenRows {
 public:
  // Row i is texts[i] and, unless `pairs` is null, (*pairs)[i]; well-formed UTF-8, read here alone.
  // Special pieces in texts are recognised. Up to `threads` >= 1 threads are used; what comes out
  // does not depend on it. `tokenizer` must outlive the rows.
  //
  // Throws std::invalid_argument if there are not as many pairs as texts, if the numbers of
  // RowOptions::words do not ascend to the number of texts, if the special pieces of
  // a row alone are longer than max_length, if truncating one text of a row is not enough, or if a
  // row that repeats `stride` ids has no room for another.
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

  // The sample of a row; its row's number unless samples overflow.
  std::size_t sample(std::size_t row) const {
    return windows_.empty() ? row : windows_[row].sample;
  }

  // How many ids of its first text, or of its second, a row has.
  std::size_t text_size(std::size_t row, int which) const;

  // Writes RowColumns::words of one row.
  void FillWords(std::size_t row, std::int32_t* words) const;

  // Writes all rows one after another: ids, and 1 where the second text of a pair and its [SEP] are
  // (0 everywhere without special pieces, as transformers has it).
  void FillFlat(int threads, std::int32_t* ids, std::uint8_t* types) const;

  // Writes rows [size, width], width >= longest(), as Width gives it: ids, types, and 1 where not
  // padded.
  template <typename T>
  void FillPadded(int threads, std::size_t width, T* ids, T* types, T* mask) const;

  // Writes further columns, flat or, with a width, padded.
  template <typename T>
  void FillColumns(int threads, std::optional<std::size_t> width,
                   const RowColumns<T>& columns) const;

 private:
  // Calls fill(row) for every row, on up to `threads` threads.
  template <typename Fill>
  void ForEachRow(int threads, Fill&& fill) const;

  // Writes one row's ids and types; returns its length.
  template <typename T, typename Type>
  std::size_t Row(std::size_t row, T* ids, Type* types) const;

  // The ids of a text that stay, and where to find what belongs to them.
  struct Ids {
    const std::int32_t* begin;
    const std::int32_t* end;
    const Encoding* part;
    std::size_t first;  // of the part's texts: this one, or the first of its words
    std::size_t size() const { return static_cast<std::size_t>(end - begin); }
  };
  static std::vector<Ids> AllIds(const std::vector<Encoding>& parts,
                                 const std::vector<std::uint64_t>* words);

  // A row of a sample that overflows: ids [begin, begin + size) of each of its texts.
  struct Window {
    std::size_t sample;
    std::size_t begin[2];
    std::size_t size[2];
    std::int32_t word[2];  // number of the word that the id before begin is of; -1 before the first
  };

  // Cuts rows to max_length and makes offsets_.
  void Shape(bool pairs);

  // The windows of a sample, which keep so many ids of its texts, in Hugging Face's order.
  void AddWindows(std::size_t sample, const std::uint64_t keep[2]);

  // The window of any row.
  Window WindowOf(std::size_t row) const;

  // Writes the numbers of the words of a window's ids.
  std::int32_t* Words(const Window& window, int which, std::int32_t* out) const;

  const Tokenizer& tokenizer_;
  const RowOptions options_;
  std::vector<Encoding> parts_[2];  // of the first texts, of the second
  std::vector<Ids> texts_[2];       // of pairs both; else the second is empty
  std::vector<Window> windows_;     // if samples overflow, of every row
  std::vector<std::int64_t> offsets_;
  std::uint64_t longest_ = 0;
};

// Appends one row, not truncated, to *ids; its second text may be null.
void EncodeRow(const Tokenizer& tokenizer, std::string_view text, const std::string_view* pair,
               const RowOptions& options, IdBuffer* ids);

}  // namespace mvbert

#endif  // MVBERT_TOKEN_ROWS_H_
