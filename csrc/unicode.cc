#include "unicode.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace mvbert {
namespace {

struct Decomposition {
  std::uint32_t code;
  std::uint32_t offset;
  std::uint32_t length;
};

struct Composition {
  std::uint32_t first;
  std::uint32_t second;
  std::uint32_t composite;
};

}  // namespace

#include "unicode_tables.inc"

namespace {

// Hangul syllables are arithmetic (The Unicode Standard, section 3.12).
constexpr char32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28, kSCount = kLCount * kVCount * kTCount;

std::uint16_t CombiningEntry(char32_t c) {
  return kCombiningBlocks[kCombiningIndex[c >> 7] << 7 | (c & 127)];
}

// The primary composite of a and b, or 0.
char32_t ComposePair(char32_t a, char32_t b) {
  if (a - kLBase < kLCount && b - kVBase < kVCount) {
    return kSBase + ((a - kLBase) * kVCount + (b - kVBase)) * kTCount;
  }
  if (a - kSBase < kSCount && (a - kSBase) % kTCount == 0 && b > kTBase && b < kTBase + kTCount) {
    return a + (b - kTBase);
  }
  const Composition* end = std::end(kCompositions);
  const Composition* at = std::lower_bound(
      std::begin(kCompositions), end, std::make_pair(a, b),
      [](const Composition& row, const std::pair<char32_t, char32_t>& key) {
        return row.first != key.first ? row.first < key.first : row.second < key.second;
      });
  return at != end && at->first == a && at->second == b ? at->composite : 0;
}

// Length of the well-formed sequence at s, or 0. `left` >= 1 bytes can be read.
std::size_t SequenceLength(const unsigned char* s, std::size_t left) {
  const unsigned char a = s[0];
  if (a < 0x80) return 1;
  const auto tail = [&](std::size_t i) { return (s[i] & 0xC0) == 0x80; };
  if (a < 0xC2) return 0;
  if (a < 0xE0) return left >= 2 && tail(1) ? 2 : 0;
  if (a < 0xF0) {
    if (left < 3 || !tail(1) || !tail(2)) return 0;
    if (a == 0xE0 && s[1] < 0xA0) return 0;  // overlong
    if (a == 0xED && s[1] > 0x9F) return 0;  // surrogates
    return 3;
  }
  if (a > 0xF4 || left < 4 || !tail(1) || !tail(2) || !tail(3)) return 0;
  if (a == 0xF0 && s[1] < 0x90) return 0;  // overlong
  if (a == 0xF4 && s[1] > 0x8F) return 0;  // above U+10FFFF
  return 4;
}

}  // namespace

std::string_view UnicodeVersion() { return kUnicodeVersionText; }

std::size_t Utf8ErrorOffset(std::string_view text) {
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const unsigned char* s = begin;
  const unsigned char* end = begin + text.size();
  while (s < end) {
    if (*s < 0x80) {
      // Plain loop over whole blocks: the compiler turns it into vector code.
      while (end - s >= 64) {
        unsigned char any = 0;
        for (int i = 0; i < 64; ++i) any |= s[i];
        if (any >= 0x80) break;
        s += 64;
      }
      while (s < end && *s < 0x80) ++s;
      continue;
    }
    const std::size_t length = SequenceLength(s, static_cast<std::size_t>(end - s));
    if (length == 0) return static_cast<std::size_t>(s - begin);
    s += length;
  }
  return kNoError;
}

void CheckUtf8(std::string_view text) {
  const std::size_t at = Utf8ErrorOffset(text);
  if (at == kNoError) return;
  static const char kHex[] = "0123456789abcdef";
  const auto byte = static_cast<unsigned char>(text[at]);
  throw std::invalid_argument(std::string("not UTF-8: byte 0x") + kHex[byte >> 4] +
                              kHex[byte & 15] + " at offset " + std::to_string(at) +
                              " does not begin a well-formed sequence");
}

std::string ReplaceIllFormed(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (true) {
    const std::size_t at = Utf8ErrorOffset(text);
    if (at == kNoError) return out.append(text);
    out.append(text.substr(0, at)).append("\xEF\xBF\xBD");
    text.remove_prefix(at + 1);
  }
}

int CombiningClass(char32_t c) { return CombiningEntry(c) & 0xFF; }

bool IsNonspacingMark(char32_t c) { return (CombiningEntry(c) & 0x100) != 0; }

void Decompose(const SourceChar& c, std::vector<SourceChar>* out) {
  const auto push = [&](char32_t code) { out->push_back({code, c.begin, c.end}); };
  if (c.code - kSBase < kSCount) {
    const char32_t s = c.code - kSBase;
    push(kLBase + s / (kVCount * kTCount));
    push(kVBase + s % (kVCount * kTCount) / kTCount);
    if (s % kTCount != 0) push(kTBase + s % kTCount);
    return;
  }
  const Decomposition* end = std::end(kDecompositions);
  const Decomposition* at =
      std::lower_bound(std::begin(kDecompositions), end, c.code,
                       [](const Decomposition& row, char32_t key) { return row.code < key; });
  if (at == end || at->code != c.code) {
    push(c.code);
    return;
  }
  for (std::uint32_t i = 0; i < at->length; ++i) push(kDecompositionText[at->offset + i]);
}

void CanonicalOrder(std::vector<SourceChar>* text) {
  constexpr std::ptrdiff_t kShort = 16;  // nearly every run
  std::vector<SourceChar> sorted;
  auto it = text->begin();
  while (it != text->end()) {
    if (CombiningClass(it->code) == 0) {
      ++it;
      continue;
    }
    auto run_end = it;
    while (run_end != text->end() && CombiningClass(run_end->code) != 0) ++run_end;
    if (run_end - it <= kShort) {
      for (auto next = it; next != run_end; ++next) {  // insertion
        const int klass = CombiningClass(next->code);
        const auto place = std::find_if(
            it, next, [klass](const SourceChar& c) { return CombiningClass(c.code) > klass; });
        std::rotate(place, next, next + 1);
      }
    } else {
      std::size_t places[256] = {};  // counting: classes are below 255
      for (auto next = it; next != run_end; ++next) ++places[CombiningClass(next->code) + 1];
      for (int klass = 1; klass < 256; ++klass) places[klass] += places[klass - 1];
      sorted.resize(static_cast<std::size_t>(run_end - it));
      for (auto next = it; next != run_end; ++next) {
        sorted[places[CombiningClass(next->code)]++] = *next;
      }
      std::copy(sorted.begin(), sorted.end(), it);
    }
    it = run_end;
  }
}

void Compose(std::vector<SourceChar>* text) {
  constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t out = 0;
  std::size_t starter = kNone;
  int last_class = 0;
  for (const SourceChar c : *text) {
    const int klass = CombiningClass(c.code);
    // Not blocked: adjacent to the starter, or only lower classes stand between.
    if (starter != kNone && (out == starter + 1 || (last_class < klass && last_class != 0))) {
      SourceChar& first = (*text)[starter];
      const char32_t composite = ComposePair(first.code, c.code);
      if (composite != 0) {
        first = {composite, std::min(first.begin, c.begin), std::max(first.end, c.end)};
        continue;
      }
    }
    if (klass == 0) starter = out;
    last_class = klass;
    (*text)[out++] = c;
  }
  text->resize(out);
}

}  // namespace mvbert
