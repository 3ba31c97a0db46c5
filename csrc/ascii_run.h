// The splitter's fast path: words of plain ASCII text, 64 bytes at a time.

#ifndef MVBERT_ASCII_RUN_H_
#define MVBERT_ASCII_RUN_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mvbert {

// What one call reads and changes.
struct AsciiRun {
  const char* at;        // the text; moved to where the call stopped
  const char* end;       // one past the text; never read
  char* bytes;           // where at[0] goes, lower-cased if asked; text is copied whole, spaces too
  std::uint32_t offset;  // of `bytes` in the buffer: what starts and ends count from
  std::uint32_t limit;   // stop at or after this many bytes
  std::uint32_t* starts;  // next free place; moved
  std::uint32_t* ends;    // next free place; moved
  bool open;              // a word is open: a start was written and not yet its end
};

// Reads until a byte that is not plain (>= 0x80, or a control character other than \t \n \r), the
// end of the text, or the limit. Words are runs of letters and digits, and single punctuation
// marks; a run that touches the stop stays open. Where accents stay, the character before a byte
// that stops the call is left unread too, since that byte may combine with it.
//
// Writes up to limit + 128 bytes, and up to 16 places past the last start and end.
using AsciiRunFunction = void (*)(AsciiRun* run);

struct AsciiRunChoice {
  const char* name;           // "plain", "avx2", "avx512", "neon"
  AsciiRunFunction uncased;   // lower-cases
  AsciiRunFunction cased;     // leaves the last character
  AsciiRunFunction accented;  // does both
};

// The fastest of the below for this machine. Thread-safe.
const AsciiRunChoice& FastestAsciiRun();

// All that this machine can run: they write the same bytes and places.
const std::vector<AsciiRunChoice>& AsciiRunChoices();

}  // namespace mvbert

#endif  // MVBERT_ASCII_RUN_H_
