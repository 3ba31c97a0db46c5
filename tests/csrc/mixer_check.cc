// Runs the mixer without Python, for sanitizers and instruction counts.
//
//   mixer_check            compares rows made by many threads, in pieces and at other places with
//   the
//                          same rows made in one go, on several worlds; exit status 0 if all is
//                          well
//   mixer_check ROWS       only makes so many rows of a world like English text (for callgrind)
//
// What a row must be is tested against the plain Python definition in test_mixer.py.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "mixer.h"
#include "philox.h"

namespace {

using mvbert::BelowN;

// Numbers of [0, n), one after the other.
class Random {
 public:
  explicit Random(std::uint64_t seed) : key_(mvbert::PhiloxKey(seed)) {}

  std::uint32_t Below(std::uint32_t n) {
    const std::uint32_t i = count_++;
    return BelowN(mvbert::Philox4x32({i, 0, 0, 0}, key_)[0], n);
  }

  double Unit() { return Below(1u << 30) / static_cast<double>(1u << 30); }

 private:
  std::array<std::uint32_t, 2> key_;
  std::uint32_t count_ = 0;
};

// A lexicon cut by a vocabulary of `size` pieces, the first five special.
struct Cut {
  std::vector<std::uint32_t> ends;
  std::vector<std::int32_t> ids;
  mvbert::Segments segments;

  // Words of higher rank (rarer) are cut into more pieces, up to `longest`.
  Cut(Random* random, std::uint32_t words, std::int32_t size, double more, std::uint32_t longest) {
    ends.push_back(0);
    for (std::uint32_t word = 1; word < words; ++word) {
      std::uint32_t count = 1;
      while (count < longest && random->Unit() < more * word / (word + 500.0)) ++count;
      for (std::uint32_t i = 0; i < count; ++i) {
        ids.push_back(
            5 + static_cast<std::int32_t>(random->Below(static_cast<std::uint32_t>(size - 5))));
      }
      ends.push_back(static_cast<std::uint32_t>(ids.size()));
    }
    segments.ends = ends.data();
    segments.ids = ids.data();
    segments.words = words;
    segments.pieces = ids.size();
    segments.size = size;
    segments.cls = 2;
    segments.sep = 3;
    segments.mask = 4;
    segments.special = {0, 1, 2, 3, 4};
  }
};

struct Batch {
  std::vector<std::int32_t> input_ids, masked_positions, labels;
  std::vector<std::uint8_t> token_type_ids;

  Batch(std::uint64_t count, std::uint32_t T, std::uint32_t M)
      : input_ids(count * T),
        masked_positions(count * M),
        labels(count * M),
        token_type_ids(count * T) {}

  mvbert::Mixer::Rows rows() {
    return {input_ids.data(), token_type_ids.data(), masked_positions.data(), labels.data()};
  }

  bool SameAs(const Batch& other, std::uint64_t first, std::uint32_t T, std::uint32_t M) const {
    return std::equal(input_ids.begin(), input_ids.end(), other.input_ids.begin() + first * T) &&
           std::equal(token_type_ids.begin(), token_type_ids.end(),
                      other.token_type_ids.begin() + first * T) &&
           std::equal(masked_positions.begin(), masked_positions.end(),
                      other.masked_positions.begin() + first * M) &&
           std::equal(labels.begin(), labels.end(), other.labels.begin() + first * M);
  }
};

struct World {
  std::vector<std::uint32_t> stream;
  std::unique_ptr<Cut> teacher, student;
  std::unique_ptr<mvbert::PieceTable> table;

  World(std::size_t length, std::uint32_t words, double marks, double more, std::uint32_t longest,
        int sides) {
    Random random(words);
    teacher = std::make_unique<Cut>(&random, words, 30522, more * 0.3, longest);
    student = std::make_unique<Cut>(&random, words, 4928, more, longest);
    table = std::make_unique<mvbert::PieceTable>(sides & 1 ? &teacher->segments : nullptr,
                                                 sides & 2 ? &student->segments : nullptr);
    for (std::size_t i = 0; i < length; ++i) {
      // Zipf's law: the logarithm of the rank is uniform.
      const double rank = std::exp(random.Unit() * std::log(static_cast<double>(words)));
      const auto word = std::min(words - 1, static_cast<std::uint32_t>(rank));
      stream.push_back(random.Unit() < marks ? 0 : word);
    }
    stream[0] = 1;
  }

  mvbert::MixerOptions Options(std::uint32_t T, double mask_prob) const {
    mvbert::MixerOptions options;
    options.seed = 12345678901234567u;
    options.T = T;
    options.stride = std::max<std::uint32_t>(
        1, std::min<std::uint32_t>(static_cast<std::uint32_t>(stream.size()), T * 3 / 4));
    options.pair_threshold = std::uint64_t{1} << 31;
    options.capacity = static_cast<std::uint32_t>(std::lround(mask_prob * T));
    for (std::uint32_t n = 0; n + 1 < T; ++n) {
      const auto budget = static_cast<std::uint32_t>(std::lround(mask_prob * n));
      options.budgets.push_back(std::min(options.capacity, std::max(1u, budget)));
    }
    return options;
  }
};

constexpr std::uint64_t kHalf = std::uint64_t{1} << 31;

int Check(const char* name, const World& world, std::uint32_t T, double mask_prob) {
  int failures = 0;
  mvbert::StreamTotals::Of(*world.table, world.stream.data(), world.stream.size(), 3);
  const mvbert::Mixer mixer(*world.table, world.stream.data(), world.stream.size(),
                            world.Options(T, mask_prob));
  const std::uint32_t M = mixer.options().capacity;
  const std::uint64_t count = 2000, start = mixer.rows_per_epoch() - 1;
  Batch whole(count, T, M);
  mixer.Read(start, count, kHalf, 1, whole.rows());

  Batch threaded(count, T, M);
  mixer.Read(start, count, kHalf, 5, threaded.rows());
  failures += !threaded.SameAs(whole, 0, T, M);

  std::vector<std::thread> readers;
  std::vector<int> good(4);
  for (std::uint64_t i = 0; i < 4; ++i) {
    readers.emplace_back([&, i] {
      Batch part(500, T, M);
      mixer.Read(start + 500 * i, 500, kHalf, 2, part.rows());
      good[i] = part.SameAs(whole, 500 * i, T, M);
    });
  }
  for (std::thread& reader : readers) reader.join();
  failures += static_cast<int>(std::count(good.begin(), good.end(), 0));

  for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{777}, count - 1}) {
    Batch one(1, T, M);
    mixer.Read(start + first, 1, kHalf, 1, one.rows());
    failures += !one.SameAs(whole, first, T, M);
  }
  for (std::uint64_t row = 0; row < count; ++row) {
    failures += whole.input_ids[row * T] % 30522 != 2;
    for (std::uint32_t j = 0; j < M; ++j) {
      const std::int32_t position = whole.masked_positions[row * M + j];
      failures += position < 0 || position > static_cast<std::int32_t>(T) - 2;
    }
  }
  if (failures) std::printf("%s, T = %u: %d failures\n", name, T, failures);
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    const World world(200'000, 20'000, 0.001, 0.4, 12, 3);
    const mvbert::Mixer mixer(*world.table, world.stream.data(), world.stream.size(),
                              world.Options(128, 0.15));
    const std::uint64_t count = std::strtoull(argv[1], nullptr, 10);
    Batch batch(count, 128, mixer.options().capacity);
    mixer.Read(0, count, kHalf, 1, batch.rows());
    std::printf("%zu pieces\n", batch.input_ids.size());
    return 0;
  }
  int failures = 0;
  {
    // A stream of marks alone has no row: a row of it would never be full.
    const std::vector<std::uint32_t> marks_alone(100, 0);
    const World world(100, 4, 0.3, 0.4, 3, 3);
    try {
      const mvbert::Mixer mixer(*world.table, marks_alone.data(), 100, world.Options(8, 0.15));
      ++failures;
    } catch (const std::invalid_argument&) {
    }
  }
  const World text(20'000, 3'000, 0.01, 0.4, 12, 3), marks(5'000, 500, 0.7, 0.4, 12, 3);
  const World longs(5'000, 500, 0.05, 0.99, 200, 3), tiny(9, 4, 0.3, 0.4, 3, 3);
  const World teacher(5'000, 500, 0.05, 0.4, 12, 1), student(5'000, 500, 0.05, 0.4, 12, 2);
  for (const std::uint32_t T : {8u, 65u, 128u, 512u}) {
    failures += Check("text", text, T, 0.15);
    failures += Check("document marks", marks, T, 0.5);
    failures += Check("long words", longs, T, 0.15);
    failures += Check("tiny stream", tiny, T, 0.15);
    failures += Check("teacher alone", teacher, T, 0.15);
    failures += Check("student alone", student, T, 0.3);
  }
  std::printf(failures ? "mixer_check: %d failures\n" : "mixer_check: all rows agree\n", failures);
  return failures != 0;
}
