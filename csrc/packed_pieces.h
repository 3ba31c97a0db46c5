// The pieces of a word in one number of 64 bits.

#ifndef MVBERT_PACKED_PIECES_H_
#define MVBERT_PACKED_PIECES_H_

#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mvbert {

// A few ids, or a place in a pool of ids. Narrow: up to four ids
// below 2^16 - 1 in 16 bits each, the unused ones all ones; of a place the first 16 bits are all
// ones. Wide, for large vocabularies: up to three ids below 2^20, their count in the top bits; zero
// there means a place. Both write ids in one go, whatever their count: no branch to guess wrong.
using Pieces = std::uint64_t;

struct Narrow {
  static constexpr std::size_t kMost = 4;
  static constexpr std::uint64_t kLimit = 0xFFFF;  // ids must be below

  static Pieces Pack(const std::int32_t* ids, std::size_t count) {
    Pieces packed = ~Pieces{0};
    for (std::size_t i = count; i-- > 0;)
      packed = packed << 16 | static_cast<std::uint64_t>(ids[i]);
    return packed;
  }
  static Pieces Place(std::size_t offset, std::size_t count) {
    return std::uint64_t{count} << 48 | std::uint64_t{offset} << 16 | 0xFFFF;
  }
  static bool IsPlace(Pieces pieces) { return (pieces & 0xFFFF) == 0xFFFF; }
  static std::size_t Offset(Pieces place) { return place >> 16 & 0xFFFFFFFF; }
  static std::size_t Count(Pieces place) { return place >> 48; }
  // Writes kMost ids and returns how many count.
  static std::size_t Unpack(Pieces pieces, std::int32_t* out) {
#ifdef __SSE2__
    const __m128i ids = _mm_cvtsi64_si128(static_cast<long long>(pieces));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(ids, _mm_setzero_si128()));
#else
    for (std::size_t i = 0; i < kMost; ++i) out[i] = static_cast<std::uint16_t>(pieces >> 16 * i);
#endif
    return (63 - static_cast<std::size_t>(__builtin_clzll(~pieces))) / 16 + 1;
  }
};

struct Wide {
  static constexpr std::size_t kMost = 3;
  static constexpr std::uint64_t kLimit = std::uint64_t{1} << 20;

  static Pieces Pack(const std::int32_t* ids, std::size_t count) {
    Pieces packed = std::uint64_t{count} << 62;
    for (std::size_t i = 0; i < count; ++i) packed |= static_cast<std::uint64_t>(ids[i]) << 20 * i;
    return packed;
  }
  static Pieces Place(std::size_t offset, std::size_t count) {
    return std::uint64_t{count} << 32 | std::uint64_t{offset};
  }
  static bool IsPlace(Pieces pieces) { return pieces >> 62 == 0; }
  static std::size_t Offset(Pieces place) { return place & 0xFFFFFFFF; }
  static std::size_t Count(Pieces place) { return place >> 32; }
  static std::size_t Unpack(Pieces pieces, std::int32_t* out) {
    for (std::size_t i = 0; i < kMost; ++i) {
      out[i] = static_cast<std::int32_t>(pieces >> 20 * i & (kLimit - 1));
    }
    return pieces >> 62;
  }
};

}  // namespace mvbert

#endif  // MVBERT_PACKED_PIECES_H_
