// Sixteen Philox4x32-10 blocks at once, in vector registers where the machine has them.

#ifndef MVBERT_PHILOX_BLOCKS_H_
#define MVBERT_PHILOX_BLOCKS_H_

#include <array>
#include <cstdint>
#include <vector>

namespace mvbert {

// Writes out[16 * w + i] = word w of the block at counter {first[i], rest[0], rest[1], rest[2]}.
using PhiloxBlocksFunction = void (*)(const std::uint32_t first[16],
                                      const std::array<std::uint32_t, 3>& rest,
                                      const std::array<std::uint32_t, 2>& key,
                                      std::uint32_t out[64]);

// The fastest of the below for this machine; chosen at the first call. Thread-safe.
PhiloxBlocksFunction PhiloxBlocks();

// All that this machine can run, by name ("plain", "avx2", "avx512"): they write the same bits.
struct PhiloxBlocksChoice {
  const char* name;
  PhiloxBlocksFunction function;
};
std::vector<PhiloxBlocksChoice> PhiloxBlocksChoices();

}  // namespace mvbert

#endif  // MVBERT_PHILOX_BLOCKS_H_
