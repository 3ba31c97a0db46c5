#include "philox_blocks.h"

#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MVBERT_PHILOX_X86 1
#include <immintrin.h>
#endif

namespace mvbert {
namespace {

using Rest = std::array<std::uint32_t, 3>;
using Key = std::array<std::uint32_t, 2>;

void Plain(const std::uint32_t first[16], const Rest& rest, const Key& key, std::uint32_t out[64]) {
  std::uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int i = 0; i < 16; ++i) {
    c0[i] = first[i];
    c1[i] = rest[0];
    c2[i] = rest[1];
    c3[i] = rest[2];
  }
  std::uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < 16; ++i) {
      const std::uint64_t product0 = std::uint64_t{kPhiloxM0} * c0[i];
      const std::uint64_t product1 = std::uint64_t{kPhiloxM1} * c2[i];
      c0[i] = static_cast<std::uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<std::uint32_t>(product1);
      c2[i] = static_cast<std::uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<std::uint32_t>(product0);
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int i = 0; i < 16; ++i) {
    out[i] = c0[i];
    out[16 + i] = c1[i];
    out[32 + i] = c2[i];
    out[48 + i] = c3[i];
  }
}

#ifdef MVBERT_PHILOX_X86

// High and low halves of the 32 x 32 bit products of eight lanes: the multiplier takes the even
// lanes, so the odd ones are moved down, and the halves are blended back together.
__attribute__((target("avx2"))) inline void Multiply8(__m256i a, __m256i m, __m256i* high,
                                                      __m256i* low) {
  const __m256i even = _mm256_mul_epu32(a, m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

__attribute__((target("avx2"))) void Avx2(const std::uint32_t first[16], const Rest& rest,
                                          const Key& key, std::uint32_t out[64]) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  // Two halves of eight lanes side by side hide the latency of the multiplier.
  __m256i c0[2], c1[2], c2[2], c3[2];
  for (int h = 0; h < 2; ++h) {
    c0[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + 8 * h));
    c1[h] = _mm256_set1_epi32(static_cast<int>(rest[0]));
    c2[h] = _mm256_set1_epi32(static_cast<int>(rest[1]));
    c3[h] = _mm256_set1_epi32(static_cast<int>(rest[2]));
  }
  std::uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i key0 = _mm256_set1_epi32(static_cast<int>(k0));
    const __m256i key1 = _mm256_set1_epi32(static_cast<int>(k1));
    for (int h = 0; h < 2; ++h) {
      __m256i high0, low0, high1, low1;
      Multiply8(c0[h], m0, &high0, &low0);
      Multiply8(c2[h], m1, &high1, &low1);
      c0[h] = _mm256_xor_si256(_mm256_xor_si256(high1, c1[h]), key0);
      c1[h] = low1;
      c2[h] = _mm256_xor_si256(_mm256_xor_si256(high0, c3[h]), key1);
      c3[h] = low0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int h = 0; h < 2; ++h) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * h), c0[h]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 + 8 * h), c1[h]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 + 8 * h), c2[h]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 48 + 8 * h), c3[h]);
  }
}

// gcc 12 takes the undefined register in its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// As Multiply8; one two-source permutation picks all high halves, another all low ones.
__attribute__((target("avx512f"))) inline void Multiply16(__m512i a, __m512i m, __m512i* high,
                                                          __m512i* low) {
  const __m512i highs =
      _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const __m512i lows = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i even = _mm512_mul_epu32(a, m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  *high = _mm512_permutex2var_epi32(even, highs, odd);
  *low = _mm512_permutex2var_epi32(even, lows, odd);
}

__attribute__((target("avx512f"))) void Avx512(const std::uint32_t first[16], const Rest& rest,
                                               const Key& key, std::uint32_t out[64]) {
  constexpr int kXor3 = 0x96;  // truth table of a ^ b ^ c
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 = _mm512_loadu_si512(first);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(rest[0]));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(rest[1]));
  __m512i c3 = _mm512_set1_epi32(static_cast<int>(rest[2]));
  std::uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    __m512i high0, low0, high1, low1;
    Multiply16(c0, m0, &high0, &low0);
    Multiply16(c2, m1, &high1, &low1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), kXor3);
    c1 = low1;
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), kXor3);
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  _mm512_storeu_si512(out, c0);
  _mm512_storeu_si512(out + 16, c1);
  _mm512_storeu_si512(out + 32, c2);
  _mm512_storeu_si512(out + 48, c3);
}

#pragma GCC diagnostic pop

#endif  // MVBERT_PHILOX_X86

}  // namespace

std::vector<PhiloxBlocksChoice> PhiloxBlocksChoices() {
  std::vector<PhiloxBlocksChoice> choices = {{"plain", Plain}};
#ifdef MVBERT_PHILOX_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) choices.push_back({"avx2", Avx2});
  if (__builtin_cpu_supports("avx512f")) choices.push_back({"avx512", Avx512});
#endif
  return choices;
}

PhiloxBlocksFunction PhiloxBlocks() {
  static const PhiloxBlocksFunction fastest = PhiloxBlocksChoices().back().function;
  return fastest;
}

}  // namespace mvbert
