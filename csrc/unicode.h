// UTF-8, and what BERT's normalisation does with each code point (Unicode 14.0.0, pinned).
//
// Everything here is a pure function of constant tables: safe from any number of threads.

#ifndef MVBERT_UNICODE_H_
#define MVBERT_UNICODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mvbert {

// The version of the Unicode Character Database behind the tables, such as "14.0.0".
std::string_view UnicodeVersion();

constexpr std::size_t kNoError = static_cast<std::size_t>(-1);

// Offset of the first byte that does not begin a well-formed UTF-8 sequence (no surrogates, no
// overlong forms, nothing above U+10FFFF), or kNoError. A sequence cut off by the end is an error
// at its first byte. O(n); ASCII at memory speed.
std::size_t Utf8ErrorOffset(std::string_view text);

// Throws std::invalid_argument naming the byte and its offset unless `text` is well-formed.
void CheckUtf8(std::string_view text);

// A copy of `text` in which every ill-formed sequence is U+FFFD (which the splitter deletes).
std::string ReplaceIllFormed(std::string_view text);

// Decodes the code point at p, which must be well-formed UTF-8, and moves p past it.
inline char32_t DecodeUtf8(const char** p) {
  const auto* s = reinterpret_cast<const unsigned char*>(*p);
  if (s[0] < 0x80) {
    *p += 1;
    return s[0];
  }
  if (s[0] < 0xE0) {
    *p += 2;
    return (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu);
  }
  if (s[0] < 0xF0) {
    *p += 3;
    return (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu);
  }
  *p += 4;
  return (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
}

// Writes c as UTF-8 at out, which needs room for 4 bytes; returns the end.
inline char* EncodeUtf8(char32_t c, char* out) {
  if (c < 0x80) {
    *out++ = static_cast<char>(c);
  } else if (c < 0x800) {
    *out++ = static_cast<char>(0xC0 | c >> 6);
    *out++ = static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    *out++ = static_cast<char>(0xE0 | c >> 12);
    *out++ = static_cast<char>(0x80 | (c >> 6 & 0x3F));
    *out++ = static_cast<char>(0x80 | (c & 0x3F));
  } else {
    *out++ = static_cast<char>(0xF0 | c >> 18);
    *out++ = static_cast<char>(0x80 | (c >> 12 & 0x3F));
    *out++ = static_cast<char>(0x80 | (c >> 6 & 0x3F));
    *out++ = static_cast<char>(0x80 | (c & 0x3F));
  }
  return out;
}

// How text is normalised.
enum class Casing {
  kUncased,   // lower-cased, without accents
  kCased,     // as it is, composed
  kAccented,  // lower-cased, composed
};

// What the splitter does with a code point.
enum CharKind : std::uint32_t {
  kLetter = 0,      // copied; part of a word
  kDrop = 1,        // deleted; its neighbours touch
  kSpace = 2,       // ends a word
  kPunct = 3,       // copied; a word by itself
  kCjk = 4,         // copied; a word by itself that nothing combines with
  kMapLetters = 5,  // replaced by a string of letters
  kMapPunct = 6,    // replaced by one punctuation mark
  kMapCjk = 7,      // replaced by one ideograph
  kGather = 8,      // needs canonical ordering or composition with its neighbours
  kMark = 9,        // uncased only: an accent, deleted
  kHangul = 10,     // uncased only: a syllable, replaced by its two or three letters
};

// kind in bits 0-3; for kMap*: length of the replacement in bits 4-7, offset in kPool from bit 8.
using CharEntry = std::uint32_t;

extern const std::uint16_t kUncasedIndex[];
extern const std::uint32_t kUncasedBlocks[];
extern const std::uint16_t kCasedIndex[];
extern const std::uint32_t kCasedBlocks[];
extern const std::uint16_t kAccentedIndex[];
extern const std::uint32_t kAccentedBlocks[];
extern const std::uint8_t kPool[];

template <Casing kCasing>
inline CharEntry EntryOf(char32_t c) {
  switch (kCasing) {
    case Casing::kUncased:
      return kUncasedBlocks[kUncasedIndex[c >> 7] << 7 | (c & 127)];
    case Casing::kCased:
      return kCasedBlocks[kCasedIndex[c >> 7] << 7 | (c & 127)];
    case Casing::kAccented:
      break;
  }
  return kAccentedBlocks[kAccentedIndex[c >> 7] << 7 | (c & 127)];
}

inline CharKind KindOf(CharEntry entry) { return static_cast<CharKind>(entry & 15); }

// The replacement of a kMap* entry, UTF-8.
inline std::string_view Replacement(CharEntry entry) {
  return {reinterpret_cast<const char*>(kPool) + (entry >> 8), entry >> 4 & 15};
}

// Canonical combining class.
int CombiningClass(char32_t c);

// General category Mn.
bool IsNonspacingMark(char32_t c);

// A code point and the code points [begin, end) of the source that it came from.
struct SourceChar {
  char32_t code;
  std::uint32_t begin;
  std::uint32_t end;
};

// Appends the full canonical decomposition of a character, not reordered.
void Decompose(const SourceChar& c, std::vector<SourceChar>* out);

// Puts runs of combining characters into canonical order. O(n), however long the runs.
void CanonicalOrder(std::vector<SourceChar>* text);

// Composes canonically ordered, fully decomposed text in place: the last step of NFC. A composite
// spans the sources of its parts. O(n).
void Compose(std::vector<SourceChar>* text);

}  // namespace mvbert

#endif  // MVBERT_UNICODE_H_
