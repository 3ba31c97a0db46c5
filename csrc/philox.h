// Philox4x32-10, the counter-based random generator: four 32-bit numbers from a 128-bit counter and
// a 64-bit key, with no state. (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011; constants as published there and in Random123.)
//
// Because nothing is carried from one call to the next, whatever is drawn here is a pure function
// of (seed, what it is drawn for): same bits for any number of threads and any order of calls.
//
// In mvbert the key is the user's seed and the second counter word says what the numbers are for,
// so that no two uses ever share a counter:
//
//   purpose          counter[0]        counter[1]            counter[2], counter[3]
//   kEpochOffset     0                 purpose               epoch, low and high 32 bits
//   kRowOrder        half of the id    purpose + 256 * round epoch, low and high 32 bits
//   kVocabulary      block             purpose               row number, low and high 32 bits
//   kRow             block             purpose               row number, low and high 32 bits
//   kHeldOut         document, low     purpose               document, high 32 bits; 0
//   kText            block             purpose               text number, low and high 32 bits
//   kMasking         block             purpose               hash of the row, low and high 32 bits
//
// mixer.h, tokenizer.h and masking.h say what the numbers decide. mvbert/text/philox.py is the same
// in plain Python.

#ifndef MVBERT_PHILOX_H_
#define MVBERT_PHILOX_H_

#include <array>
#include <cstdint>

namespace mvbert {

enum class Purpose : std::uint32_t {
  kEpochOffset = 1,
  kRowOrder = 2,
  kVocabulary = 3,
  kRow = 4,
  kHeldOut = 5,
  kText = 6,
  kMasking = 7,
};

inline constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u;
inline constexpr std::uint32_t kPhiloxM1 = 0xCD9E8D57u;
inline constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u;
inline constexpr std::uint32_t kPhiloxW1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

// The four numbers of one counter.
inline std::array<std::uint32_t, 4> Philox4x32(std::array<std::uint32_t, 4> counter,
                                               std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kPhiloxM0} * counter[0];
    const std::uint64_t product1 = std::uint64_t{kPhiloxM1} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kPhiloxW0;
    key[1] += kPhiloxW1;
  }
  return counter;
}

// The key of a 64-bit seed: low half first.
inline std::array<std::uint32_t, 2> PhiloxKey(std::uint64_t seed) {
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
}

// A number of [0, n) from 32 random bits by multiplication (Lemire 2019, without his rejection: the
// most favoured number is drawn at most n / 2^32 too often).
inline std::uint32_t BelowN(std::uint32_t bits, std::uint32_t n) {
  return static_cast<std::uint32_t>((std::uint64_t{bits} * n) >> 32);
}

}  // namespace mvbert

#endif  // MVBERT_PHILOX_H_
