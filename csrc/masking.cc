#include "masking.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "philox.h"
#include "philox_blocks.h"
#include "share.h"

namespace mvbert {
namespace {

// The numbers of one row, 64 at a time.
class Draws {
 public:
  Draws(PhiloxBlocksFunction blocks, std::uint64_t seed) : blocks_(blocks), key_(PhiloxKey(seed)) {}

  void Begin(std::uint64_t row) {
    rest_ = {static_cast<std::uint32_t>(Purpose::kMasking), static_cast<std::uint32_t>(row),
             static_cast<std::uint32_t>(row >> 32)};
    next_ = kNumbers;
    block_ = 0;
  }

  // The next number, which Skip() goes past.
  std::uint32_t Peek() {
    if (next_ == kNumbers) Fill();
    return numbers_[next_ % 4 * 16 + next_ / 4];
  }
  void Skip(std::uint32_t count) { next_ += count; }  // 0 or 1
  std::uint32_t Next() {
    const std::uint32_t number = Peek();
    Skip(1);
    return number;
  }

 private:
  static constexpr std::uint32_t kNumbers = 64;

  void Fill() {
    std::uint32_t first[16];
    for (std::uint32_t i = 0; i < 16; ++i) first[i] = block_ + i;
    blocks_(first, rest_, key_, numbers_);
    block_ += 16;
    next_ = 0;
  }

  const PhiloxBlocksFunction blocks_;
  const std::array<std::uint32_t, 2> key_;
  std::array<std::uint32_t, 3> rest_{};
  std::uint32_t next_ = kNumbers;
  std::uint32_t block_ = 0;
  std::uint32_t numbers_[kNumbers];  // the four of a block lie 16 apart
};

std::uint64_t HashStep(std::uint64_t hash, std::int64_t id) {
  return ((hash << 5 | hash >> 59) ^ static_cast<std::uint64_t>(id)) * 0x9E3779B97F4A7C15u;
}

constexpr std::size_t kHashed = 4;  // rows at once

// A step waits for the multiplication of the one before it, so kHashed rows take turns.
void HashRows(const std::int64_t* ids, const std::int64_t* lengths, std::size_t width,
              std::uint64_t epoch, std::uint64_t hashes[kHashed]) {
  const std::int64_t shared = *std::min_element(lengths, lengths + kHashed);
  std::uint64_t hash[kHashed] = {epoch, epoch, epoch, epoch};
  for (std::int64_t i = 0; i < shared; ++i) {
    for (std::size_t row = 0; row < kHashed; ++row) {
      hash[row] = HashStep(hash[row], ids[row * width + static_cast<std::size_t>(i)]);
    }
  }
  for (std::size_t row = 0; row < kHashed; ++row) {
    for (std::int64_t i = shared; i < lengths[row]; ++i) {
      hash[row] = HashStep(hash[row], ids[row * width + static_cast<std::size_t>(i)]);
    }
    hashes[row] = hash[row] ^ hash[row] >> 32;
  }
}

// One thread's rows.
class Masker {
 public:
  Masker(const MaskingOptions& options, std::size_t width)
      : options_(options),
        draws_(PhiloxBlocks(), options.seed),
        words_(width + 1),
        chosen_(width / 64 + 1),
        masked_(width + 1) {}

  void Mask(std::uint64_t hash, std::size_t length, std::size_t width, std::int64_t* ids,
            std::int64_t* labels) {
    std::fill(labels, labels + width, -100);
    draws_.Begin(hash);
    if (options_.by_word) {
      ChooseWords(ids, length, labels);
    } else {
      ChoosePieces(ids, length, labels);
    }
  }

 private:
  PieceKind Kind(std::int64_t id) const {
    return static_cast<PieceKind>(options_.kinds[static_cast<std::size_t>(id)]);
  }

  // What becomes of the masked pieces, at the first `count` places of masked_.
  void Replace(std::size_t count, std::int64_t* ids, std::int64_t* labels) {
    const auto vocabulary = static_cast<std::uint32_t>(options_.vocabulary);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t place = masked_[i];
      const std::uint32_t what = draws_.Next();
      const std::int64_t other = BelowN(draws_.Next(), vocabulary);
      const std::int64_t id = ids[place];
      const std::int64_t replaced = what < options_.other_threshold ? other : id;
      labels[place] = id;
      ids[place] = what < options_.mask_threshold ? options_.mask : replaced;
    }
  }

  // Each piece by a number of its own.
  void ChoosePieces(std::int64_t* ids, std::size_t length, std::int64_t* labels) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < length; ++i) {
      const std::uint32_t may = Kind(ids[i]) <= kBegins ? 1 : 0;
      const std::uint32_t is = draws_.Peek() < options_.piece_threshold ? 1 : 0;
      draws_.Skip(may);
      masked_[count] = static_cast<std::uint32_t>(i);
      count += may & is;
    }
    Replace(count, ids, labels);
  }

  // The first words of a shuffle, each taken if its pieces fit into what is left of the budget.
  void ChooseWords(std::int64_t* ids, std::size_t length, std::int64_t* labels) {
    std::size_t budget = options_.budgets[length];
    if (budget == 0) return;
    // words_[1 ..]; the end of none goes to words_[0].
    std::size_t count = 0;
    bool open = false;
    for (std::size_t i = 0; i < length; ++i) {
      const PieceKind kind = Kind(ids[i]);
      const bool separates = kind == kSeparates;
      const bool begins = !separates & !((kind == kContinues) & open);
      words_[count + 1].begin = static_cast<std::uint32_t>(i);
      count += begins;
      words_[separates ? 0 : count].end = static_cast<std::uint32_t>(i + 1);
      open = !separates;
    }
    for (std::size_t step = 0; budget > 0 && step < count; ++step) {
      const std::size_t other =
          step + BelowN(draws_.Next(), static_cast<std::uint32_t>(count - step));
      const Word word = words_[1 + other];
      words_[1 + other] = words_[1 + step];
      const std::size_t size = word.end - word.begin;
      if (size > budget) continue;
      budget -= size;
      for (std::uint32_t i = word.begin; i < word.end; ++i) {
        chosen_[i / 64] |= std::uint64_t{Kind(ids[i]) != kStays} << (i % 64);
      }
    }
    std::size_t masked = 0;
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      for (std::uint64_t bits = std::exchange(chosen_[i], 0); bits != 0; bits &= bits - 1) {
        masked_[masked++] =
            static_cast<std::uint32_t>(64 * i) + static_cast<std::uint32_t>(__builtin_ctzll(bits));
      }
    }
    Replace(masked, ids, labels);
  }

  struct Word {
    std::uint32_t begin, end;
  };
  const MaskingOptions& options_;
  Draws draws_;
  std::vector<Word> words_;
  std::vector<std::uint64_t> chosen_;  // one bit a place; 0 between rows
  std::vector<std::uint32_t> masked_;  // places, and room for one that is not
};

// Throws for the first id of a row that is not in the vocabulary.
void CheckIds(const MaskingOptions& options, std::size_t row, const std::int64_t* ids,
              std::size_t length) {
  // The sign of id, or of last - id, for any of them, without a branch for each.
  const std::uint64_t last = std::uint64_t{options.vocabulary} - 1;
  std::uint64_t signs = 0;
  for (std::size_t i = 0; i < length; ++i) {
    const auto id = static_cast<std::uint64_t>(ids[i]);
    signs |= id | (last - id);
  }
  if (signs >> 63 == 0) return;
  for (std::size_t i = 0; i < length; ++i) {
    if (ids[i] < 0 || static_cast<std::uint64_t>(ids[i]) > last || options.vocabulary == 0) {
      throw std::invalid_argument("row " + std::to_string(row) + " has the id " +
                                  std::to_string(ids[i]) + ", outside the vocabulary of " +
                                  std::to_string(options.vocabulary) + " pieces");
    }
  }
}

}  // namespace

void MaskRows(const MaskingOptions& options, std::size_t rows, std::size_t width,
              const std::int64_t* lengths, int threads, std::int64_t* ids, std::int64_t* labels) {
  if (options.by_word && options.budget_count <= width) {
    throw std::invalid_argument("there is no budget for rows of " + std::to_string(width));
  }
  for (std::size_t row = 0; row < rows; ++row) {
    if (lengths[row] < 0 || static_cast<std::size_t>(lengths[row]) > width) {
      throw std::invalid_argument("row " + std::to_string(row) + " has a length of " +
                                  std::to_string(lengths[row]) + " in a batch of width " +
                                  std::to_string(width));
    }
  }
  constexpr std::size_t kRows = 64;  // a thread takes at once
  const auto share = [&](auto&& work) {
    Share((rows + kRows - 1) / kRows, threads, [&](auto&& next) {
      for (std::size_t part; next(&part);) work(part * kRows, std::min(rows, (part + 1) * kRows));
    });
  };
  share([&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      CheckIds(options, row, ids + row * width, static_cast<std::size_t>(lengths[row]));
    }
  });
  share([&](std::size_t begin, std::size_t end) {
    Masker masker(options, width);
    const std::int64_t none[kHashed] = {};
    for (std::size_t row = begin; row < end; row += kHashed) {
      const std::size_t count = std::min(kHashed, end - row);
      std::uint64_t hashes[kHashed];
      std::int64_t sizes[kHashed];
      std::copy(none, none + kHashed, sizes);
      std::copy(lengths + row, lengths + row + count, sizes);
      HashRows(ids + row * width, sizes, width, options.epoch, hashes);
      for (std::size_t i = 0; i < count; ++i) {
        masker.Mask(hashes[i], static_cast<std::size_t>(sizes[i]), width, ids + (row + i) * width,
                    labels + (row + i) * width);
      }
    }
  });
}

bool LengthsOfMask(const std::int64_t* mask, std::size_t rows, std::size_t width,
                   std::int64_t* lengths) {
  for (std::size_t row = 0; row < rows; ++row, mask += width) {
    std::uint64_t ones = 0, wrong = 0;
    for (std::size_t i = 0; i < width; ++i) ones += static_cast<std::uint64_t>(mask[i]);
    if (ones > width) return false;
    const auto length = static_cast<std::size_t>(ones);
    for (std::size_t i = 0; i < length; ++i) wrong |= static_cast<std::uint64_t>(mask[i]) ^ 1;
    for (std::size_t i = length; i < width; ++i) wrong |= static_cast<std::uint64_t>(mask[i]);
    if (wrong != 0) return false;
    lengths[row] = static_cast<std::int64_t>(length);
  }
  return true;
}

}  // namespace mvbert
