#include "ascii_run.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MVBERT_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define MVBERT_NEON 1
#include <arm_neon.h>
#endif

namespace mvbert {
namespace {

// One bit a byte of a block. What is in no mask is a letter or a digit.
struct Masks {
  std::uint64_t slow;   // not for this path
  std::uint64_t space;  // space, \t, \n, \r
  std::uint64_t punct;
};

constexpr bool IsSpace(unsigned char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

constexpr bool IsSlow(unsigned char c) { return c >= 0x7F || (c < 0x20 && !IsSpace(c)); }

constexpr bool IsPunct(unsigned char c) {
  return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
         (c >= 123 && c <= 126);
}

// Appends the places of the set bits, plus `offset`. Writes eight at a time: what is past the
// returned end is rubbish.
inline std::uint32_t* FlattenBits(std::uint64_t bits, std::uint32_t offset, std::uint32_t* out) {
  const int count = __builtin_popcountll(bits);
  std::uint32_t* const end = out + count;
  while (out < end) {
    for (int i = 0; i < 8; ++i) {
      // ctz of zero is not defined; the top bit set changes no other count.
      out[i] = offset + static_cast<std::uint32_t>(__builtin_ctzll(bits | std::uint64_t{1} << 63));
      bits &= bits - 1;
    }
    out += 8;
  }
  return end;
}

// ---- plain C++ ------------------------------------------------------------------------------

namespace plain {

struct Table {
  std::uint8_t kind[256];  // 1 slow, 2 space, 4 punctuation
  char lower[256];
  constexpr Table() : kind(), lower() {
    for (int c = 0; c < 256; ++c) {
      const auto byte = static_cast<unsigned char>(c);
      kind[c] = IsSlow(byte) ? 1 : IsSpace(byte) ? 2 : IsPunct(byte) ? 4 : 0;
      lower[c] = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    }
  }
};

constexpr Table kTable;

template <bool kLowercase>
inline void Classify(const char* in, char* out, Masks* masks) {
  *masks = {0, 0, 0};
  for (int i = 0; i < 64; ++i) {
    const auto c = static_cast<unsigned char>(in[i]);
    const std::uint64_t kind = kTable.kind[c];
    masks->slow |= (kind & 1) << i;
    masks->space |= (kind >> 1 & 1) << i;
    masks->punct |= (kind >> 2) << i;
    out[i] = kLowercase ? kTable.lower[c] : in[i];
  }
}

inline std::uint32_t* Flatten(std::uint64_t bits, std::uint32_t offset, std::uint32_t* out) {
  return FlattenBits(bits, offset, out);
}

#define MVBERT_TARGET
#include "ascii_run.inc"
#undef MVBERT_TARGET

}  // namespace plain

// Classes by nibbles (Langdale and Lemire, "Parsing gigabytes of JSON per second", 2019): bit k of
// kByLow[low] & kByHigh[high] says that the byte lies in rectangle k of the ASCII table. Rectangles
// 0 and 1 are spaces, the others punctuation.
#if defined(MVBERT_X86) || defined(MVBERT_NEON)
struct Nibbles {
  std::uint8_t low[16];
  std::uint8_t high[16];
  constexpr Nibbles() : low(), high() {
    for (int i = 0; i < 16; ++i) {
      low[i] =
          static_cast<std::uint8_t>((i == 0x9 || i == 0xA || i == 0xD ? 1 : 0) | (i == 0 ? 2 : 0) |
                                    (i >= 1 ? 4 : 0) | (i >= 0xA ? 8 : 0) | (i == 0 ? 16 : 0) |
                                    (i >= 0xB ? 32 : 0) | (i >= 0xB && i <= 0xE ? 64 : 0));
    }
    high[0] = 1;
    high[2] = 2 | 4;
    high[3] = 8;
    high[4] = 16;
    high[5] = 32;
    high[6] = 16;
    high[7] = 64;
  }
};

alignas(16) constexpr Nibbles kNibbles;
constexpr int kSpaceRectangles = 3;
#endif

#ifdef MVBERT_X86

// GCC 12 takes the undefined vectors inside its own intrinsics for ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// ---- AVX2 -----------------------------------------------------------------------------------

namespace avx2 {

#define MVBERT_TARGET __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt")))

template <bool kLowercase>
MVBERT_TARGET inline void ClassifyHalf(const char* in, char* out, std::uint32_t* slow,
                                       std::uint32_t* space, std::uint32_t* punct) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  const __m256i by_low =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kNibbles.low)));
  const __m256i by_high =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kNibbles.high)));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  // The shuffle gives 0 for bytes >= 0x80.
  const __m256i kind =
      _mm256_and_si256(_mm256_shuffle_epi8(by_low, v), _mm256_shuffle_epi8(by_high, high));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i not_space =
      _mm256_cmpeq_epi8(_mm256_and_si256(kind, _mm256_set1_epi8(kSpaceRectangles)), zero);
  const __m256i is_punct = _mm256_cmpgt_epi8(kind, _mm256_set1_epi8(kSpaceRectangles));
  // Below 0x20 as a signed byte: control characters, and everything from 0x80 on.
  const __m256i is_slow =
      _mm256_or_si256(_mm256_and_si256(_mm256_cmpgt_epi8(_mm256_set1_epi8(0x20), v), not_space),
                      _mm256_cmpeq_epi8(v, _mm256_set1_epi8(0x7F)));
  *slow = static_cast<std::uint32_t>(_mm256_movemask_epi8(is_slow));
  *space = ~static_cast<std::uint32_t>(_mm256_movemask_epi8(not_space));
  *punct = static_cast<std::uint32_t>(_mm256_movemask_epi8(is_punct));
  __m256i text = v;
  if (kLowercase) {
    const __m256i is_upper = _mm256_and_si256(_mm256_cmpgt_epi8(v, _mm256_set1_epi8('A' - 1)),
                                              _mm256_cmpgt_epi8(_mm256_set1_epi8('Z' + 1), v));
    text = _mm256_or_si256(v, _mm256_and_si256(is_upper, _mm256_set1_epi8(0x20)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), text);
}

template <bool kLowercase>
MVBERT_TARGET inline void Classify(const char* in, char* out, Masks* masks) {
  std::uint32_t slow[2], space[2], punct[2];
  ClassifyHalf<kLowercase>(in, out, slow, space, punct);
  ClassifyHalf<kLowercase>(in + 32, out + 32, slow + 1, space + 1, punct + 1);
  masks->slow = slow[0] | std::uint64_t{slow[1]} << 32;
  masks->space = space[0] | std::uint64_t{space[1]} << 32;
  masks->punct = punct[0] | std::uint64_t{punct[1]} << 32;
}

MVBERT_TARGET inline std::uint32_t* Flatten(std::uint64_t bits, std::uint32_t offset,
                                            std::uint32_t* out) {
  const int count = __builtin_popcountll(bits);
  std::uint32_t* const end = out + count;
  while (out < end) {
    for (int i = 0; i < 8; ++i) {
      out[i] = offset + static_cast<std::uint32_t>(_tzcnt_u64(bits));
      bits = _blsr_u64(bits);
    }
    out += 8;
  }
  return end;
}

#include "ascii_run.inc"
#undef MVBERT_TARGET

}  // namespace avx2

// ---- AVX-512 --------------------------------------------------------------------------------

namespace avx512 {

#define MVBERT_TARGET    \
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt,lzcnt")))

template <bool kLowercase>
MVBERT_TARGET inline void Classify(const char* in, char* out, Masks* masks) {
  const __m512i v = _mm512_loadu_si512(in);
  const __m512i kind = _mm512_permutex2var_epi8(_mm512_loadu_si512(plain::kTable.kind), v,
                                                _mm512_loadu_si512(plain::kTable.kind + 64));
  masks->slow = _mm512_test_epi8_mask(kind, _mm512_set1_epi8(1)) | _mm512_movepi8_mask(v);
  masks->space = _mm512_test_epi8_mask(kind, _mm512_set1_epi8(2));
  masks->punct = _mm512_test_epi8_mask(kind, _mm512_set1_epi8(4));
  __m512i text = v;
  if (kLowercase) {
    const __mmask64 is_upper =
        _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('A')), _mm512_set1_epi8(26));
    text = _mm512_mask_add_epi8(v, is_upper, v, _mm512_set1_epi8(32));
  }
  _mm512_storeu_si512(out, text);
}

MVBERT_TARGET inline std::uint32_t* Flatten(std::uint64_t bits, std::uint32_t offset,
                                            std::uint32_t* out) {
  alignas(64) static constexpr std::uint8_t kIota[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const int count = __builtin_popcountll(bits);
  const __m512i places = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kIota));
  const __m512i base = _mm512_set1_epi32(static_cast<int>(offset));
  const auto store = [&](int i, __m128i bytes) MVBERT_TARGET {
    _mm512_storeu_si512(out + 16 * i, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(bytes)));
  };
  store(0, _mm512_castsi512_si128(places));
  if (count > 16) {
    store(1, _mm512_extracti32x4_epi32(places, 1));
    if (count > 32) {
      store(2, _mm512_extracti32x4_epi32(places, 2));
      store(3, _mm512_extracti32x4_epi32(places, 3));
    }
  }
  return out + count;
}

#include "ascii_run.inc"
#undef MVBERT_TARGET

}  // namespace avx512

#pragma GCC diagnostic pop

#endif  // MVBERT_X86

#ifdef MVBERT_NEON

namespace neon {

#define MVBERT_TARGET

// One bit for each of 64 bytes that are all ones or all zeros.
inline std::uint64_t Bits(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
  const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t ab = vpaddq_u8(vandq_u8(a, weights), vandq_u8(b, weights));
  const uint8x16_t cd = vpaddq_u8(vandq_u8(c, weights), vandq_u8(d, weights));
  ab = vpaddq_u8(ab, cd);
  ab = vpaddq_u8(ab, ab);
  return vgetq_lane_u64(vreinterpretq_u64_u8(ab), 0);
}

template <bool kLowercase>
inline void Classify(const char* in, char* out, Masks* masks) {
  const uint8x16_t by_low = vld1q_u8(kNibbles.low), by_high = vld1q_u8(kNibbles.high);
  uint8x16_t slow[4], space[4], punct[4];
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t v = vld1q_u8(reinterpret_cast<const std::uint8_t*>(in) + 16 * i);
    // Rows 8 to 15 of by_high are zero, so bytes >= 0x80 get no class.
    const uint8x16_t kind = vandq_u8(vqtbl1q_u8(by_low, vandq_u8(v, vdupq_n_u8(15))),
                                     vqtbl1q_u8(by_high, vshrq_n_u8(v, 4)));
    space[i] = vtstq_u8(kind, vdupq_n_u8(kSpaceRectangles));
    punct[i] = vcgtq_u8(kind, vdupq_n_u8(kSpaceRectangles));
    slow[i] =
        vorrq_u8(vbicq_u8(vcltq_u8(v, vdupq_n_u8(0x20)), space[i]), vcgeq_u8(v, vdupq_n_u8(0x7F)));
    uint8x16_t text = v;
    if (kLowercase) {
      const uint8x16_t upper = vcltq_u8(vsubq_u8(v, vdupq_n_u8('A')), vdupq_n_u8(26));
      text = vorrq_u8(v, vandq_u8(upper, vdupq_n_u8(0x20)));
    }
    vst1q_u8(reinterpret_cast<std::uint8_t*>(out) + 16 * i, text);
  }
  masks->slow = Bits(slow[0], slow[1], slow[2], slow[3]);
  masks->space = Bits(space[0], space[1], space[2], space[3]);
  masks->punct = Bits(punct[0], punct[1], punct[2], punct[3]);
}

inline std::uint32_t* Flatten(std::uint64_t bits, std::uint32_t offset, std::uint32_t* out) {
  return FlattenBits(bits, offset, out);
}

#include "ascii_run.inc"
#undef MVBERT_TARGET

}  // namespace neon

#endif  // MVBERT_NEON

}  // namespace

const std::vector<AsciiRunChoice>& AsciiRunChoices() {
  static const std::vector<AsciiRunChoice> choices = [] {
    std::vector<AsciiRunChoice> found = {
        {"plain", plain::Run<true, false>, plain::Run<false, true>, plain::Run<true, true>}};
#ifdef MVBERT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2")) {
      found.push_back(
          {"avx2", avx2::Run<true, false>, avx2::Run<false, true>, avx2::Run<true, true>});
      if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")) {
        found.push_back({"avx512", avx512::Run<true, false>, avx512::Run<false, true>,
                         avx512::Run<true, true>});
      }
    }
#endif
#ifdef MVBERT_NEON
    found.push_back(
        {"neon", neon::Run<true, false>, neon::Run<false, true>, neon::Run<true, true>});
#endif
    return found;
  }();
  return choices;
}

const AsciiRunChoice& FastestAsciiRun() { return AsciiRunChoices().back(); }

}  // namespace mvbert
