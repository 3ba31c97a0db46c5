// libFuzzer: rows of any stream, segmentations and options stay inside their bounds and do not
// depend on threads or on how many are read at once.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "fuzz_input.h"
#include "mixer.h"

namespace mvbert {
namespace {

struct Side {
  std::vector<std::uint32_t> ends;
  std::vector<std::int32_t> ids;
  Segments segments;
};

void Fill(FuzzInput* input, std::uint32_t words, Side* side) {
  const std::uint32_t vocabulary = input->Number(5, 60);
  for (std::uint32_t w = 0; w < words; ++w) {
    const std::uint32_t pieces = w == 0 ? 0 : 1 + input->Byte() % 9;
    for (std::uint32_t i = 0; i < pieces; ++i) {
      side->ids.push_back(static_cast<std::int32_t>(input->Byte() % vocabulary));
    }
    side->ends.push_back(static_cast<std::uint32_t>(side->ids.size()));
  }
  side->segments = {side->ends.data(),
                    side->ids.data(),
                    words,
                    side->ids.size(),
                    static_cast<std::int32_t>(vocabulary),
                    2,
                    3,
                    4,
                    {0, 1, 2, 3, 4}};
}

struct Batch {
  Batch(std::uint64_t count, std::uint32_t T, std::uint32_t M)
      : ids(count * T, -7), positions(count * M, -7), labels(count * M, -7), types(count * T, 77) {}
  Mixer::Rows rows() { return {ids.data(), types.data(), positions.data(), labels.data()}; }
  std::vector<std::int32_t> ids, positions, labels;
  std::vector<std::uint8_t> types;
};

}  // namespace
}  // namespace mvbert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mvbert;
  FuzzInput input(data, size);
  const std::uint8_t flags = input.Byte();
  const std::uint32_t words = input.Number(1, 20);
  Side teacher, student;
  Fill(&input, words, &teacher);
  Fill(&input, words, &student);
  std::unique_ptr<PieceTable> table;
  MixerOptions options;
  options.seed = input.Byte();
  options.T = input.Number(6, 140);
  options.stride = input.Number(0, 50);
  options.pair_threshold = std::uint64_t{input.Byte()} << 24;
  options.capacity = input.Number(0, options.T + 1);
  for (std::uint32_t n = 0; n + 1 < options.T; ++n) {
    options.budgets.push_back(n * (flags >> 4) / 15 < options.capacity ? n * (flags >> 4) / 15
                                                                       : options.capacity);
  }
  const std::uint64_t threshold = std::uint64_t{input.Byte()} << 24;
  const std::uint64_t start = std::uint64_t{input.Byte()} << (flags % 56);
  std::vector<std::uint32_t> stream;
  while (!input.empty()) stream.push_back(input.Byte() % words);
  std::unique_ptr<Mixer> mixer;
  StreamTotals totals;
  try {
    table = std::make_unique<PieceTable>((flags & 3) == 1 ? nullptr : &teacher.segments,
                                         (flags & 3) == 2 ? nullptr : &student.segments);
    totals = StreamTotals::Of(*table, stream.data(), stream.size(), 2);
    mixer = std::make_unique<Mixer>(*table, stream.data(), stream.size(), options);
    Require(totals.marks < stream.size(), "a stream without words was taken");
  } catch (const std::invalid_argument&) {
    return 0;
  }
  constexpr std::uint64_t kRows = 6;
  const std::uint32_t T = options.T, M = options.capacity;
  const std::int32_t joint = ((flags & 3) == 1 ? 0 : teacher.segments.size) +
                             ((flags & 3) == 2 ? 0 : student.segments.size);
  Batch all(kRows, T, M);
  mixer->Read(start, kRows, threshold, 2, all.rows());
  for (const std::int32_t id : all.ids) Require(id >= 0 && id < joint, "an id outside");
  for (const std::uint8_t type : all.types) Require(type <= 1, "a token type");
  for (std::uint64_t row = 0; row < kRows; ++row) {
    Batch one(1, T, M);
    mixer->Read(start + row, 1, threshold, 1, one.rows());
    for (std::uint32_t i = 0; i < T; ++i) {
      Require(one.ids[i] == all.ids[row * T + i], "another id by itself");
      Require(one.types[i] == all.types[row * T + i], "another type by itself");
    }
    for (std::uint32_t j = 0; j < M; ++j) {
      const std::int32_t position = all.positions[row * M + j], label = all.labels[row * M + j];
      Require(one.positions[j] == position && one.labels[j] == label, "another label by itself");
      Require(label == -100 ? position == 0
                            : label >= 0 && label < joint && position > 0 &&
                                  position < static_cast<std::int32_t>(T) - 1,
              "a label or a position outside");
      if (j > 0 && label != -100) {
        Require(position > all.positions[row * M + j - 1], "positions do not ascend");
      }
    }
  }
  return 0;
}
