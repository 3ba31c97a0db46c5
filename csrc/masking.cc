#include "masking.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "philox.h"
#include "share.h"

namespace mvbert {
namespace {

// The numbers of one row.
class Draws {
 public:
  Draws(std::uint64_t seed, std::uint64_t row) : key_(PhiloxKey(seed)), row_(row) {}
  std::uint32_t Next() {
    if (next_ % 4 == 0) {
      block_ =
          Philox4x32({next_ / 4, static_cast<std::uint32_t>(Purpose::kMasking),
                      static_cast<std::uint32_t>(row_), static_cast<std::uint32_t>(row_ >> 32)},
                     key_);
    }
    return block_[next_++ % 4];
  }

 private:
  const std::array<std::uint32_t, 2> key_;
  const std::uint64_t row_;
  std::array<std::uint32_t, 4> block_{};
  std::uint32_t next_ = 0;
};

std::uint64_t HashOfRow(const std::int64_t* ids, std::size_t length, std::uint64_t epoch) {
  std::uint64_t hash = epoch;
  for (std::size_t i = 0; i < length; ++i) {
    hash = ((hash << 5 | hash >> 59) ^ static_cast<std::uint64_t>(ids[i])) * 0x9E3779B97F4A7C15u;
  }
  return hash ^ hash >> 32;
}

// One thread's rows.
class Masker {
 public:
  explicit Masker(const MaskingOptions& options) : options_(options) {}

  void Mask(std::size_t length, std::size_t width, std::int64_t* ids, std::int64_t* labels) {
    std::fill(labels, labels + width, -100);
    Draws draws(options_.seed, HashOfRow(ids, length, options_.epoch));
    if (options_.by_word) {
      ChooseWords(ids, length, &draws, labels);
    } else {
      for (std::size_t i = 0; i < length; ++i) {
        const bool may = Kind(ids[i]) <= kBegins;
        if (may && draws.Next() < options_.piece_threshold) labels[i] = ids[i];
      }
    }
    const auto vocabulary = static_cast<std::uint32_t>(options_.kinds.size());
    for (std::size_t i = 0; i < length; ++i) {
      if (labels[i] < 0) continue;
      const std::uint32_t what = draws.Next(), other = draws.Next();
      if (what < options_.mask_threshold) {
        ids[i] = options_.mask;
      } else if (what < options_.other_threshold) {
        ids[i] = BelowN(other, vocabulary);
      }
    }
  }

 private:
  PieceKind Kind(std::int64_t id) const {
    return static_cast<PieceKind>(options_.kinds[static_cast<std::size_t>(id)]);
  }

  // The first words of a shuffle, each taken if its pieces fit into what is left of the budget.
  void ChooseWords(const std::int64_t* ids, std::size_t length, Draws* draws,
                   std::int64_t* labels) {
    words_.clear();
    bool open = false;
    for (std::size_t i = 0; i < length; ++i) {
      const PieceKind kind = Kind(ids[i]);
      if (kind == kSeparates) {
        open = false;
      } else if (kind == kContinues && open) {
        words_.back().end = i + 1;
      } else {
        words_.push_back({i, i + 1});
        open = true;
      }
    }
    std::size_t budget = options_.budgets[length];
    for (std::size_t step = 0; budget > 0 && step < words_.size(); ++step) {
      const std::size_t other =
          step + BelowN(draws->Next(), static_cast<std::uint32_t>(words_.size() - step));
      std::swap(words_[step], words_[other]);
      const auto [begin, end] = words_[step];
      if (end - begin > budget) continue;
      budget -= end - begin;
      for (std::size_t i = begin; i < end; ++i) {
        if (Kind(ids[i]) != kStays) labels[i] = ids[i];
      }
    }
  }

  struct Word {
    std::size_t begin, end;
  };
  const MaskingOptions& options_;
  std::vector<Word> words_;
};

}  // namespace

void MaskRows(const MaskingOptions& options, std::size_t rows, std::size_t width,
              const std::int64_t* lengths, int threads, std::int64_t* ids, std::int64_t* labels) {
  if (options.by_word && options.budgets.size() <= width) {
    throw std::invalid_argument("there is no budget for rows of " + std::to_string(width));
  }
  constexpr std::size_t kRows = 64;  // a thread takes at once
  const auto share = [&](auto&& work) {
    Share((rows + kRows - 1) / kRows, threads, [&](auto&& next) {
      Masker masker(options);
      for (std::size_t part; next(&part);) {
        const std::size_t end = std::min(rows, (part + 1) * kRows);
        for (std::size_t row = part * kRows; row < end; ++row) work(&masker, row);
      }
    });
  };
  share([&](Masker*, std::size_t row) {
    const std::int64_t length = lengths[row];
    if (length < 0 || static_cast<std::size_t>(length) > width) {
      throw std::invalid_argument("row " + std::to_string(row) + " has a length of " +
                                  std::to_string(length) + " in a batch of width " +
                                  std::to_string(width));
    }
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t id = ids[row * width + static_cast<std::size_t>(i)];
      if (id < 0 || static_cast<std::size_t>(id) >= options.kinds.size()) {
        throw std::invalid_argument("row " + std::to_string(row) + " has the id " +
                                    std::to_string(id) + ", outside the vocabulary of " +
                                    std::to_string(options.kinds.size()) + " pieces");
      }
    }
  });
  share([&](Masker* masker, std::size_t row) {
    masker->Mask(static_cast<std::size_t>(lengths[row]), width, ids + row * width,
                 labels + row * width);
  });
}

}  // namespace mvbert
