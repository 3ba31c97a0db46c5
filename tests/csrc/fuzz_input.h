// What the fuzz targets share: bytes as numbers and as texts with long runs, a failure that stops
// the fuzzer, and a limit on the time that an input may take.

#ifndef MVBERT_TESTS_FUZZ_INPUT_H_
#define MVBERT_TESTS_FUZZ_INPUT_H_

#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "unicode.h"

namespace mvbert {

inline void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "check failed: %s\n", what);
  std::abort();
}

// The fuzzer's bytes, taken from the front; zeros when they are used up.
class FuzzInput {
 public:
  FuzzInput(const std::uint8_t* data, std::size_t size)
      : bytes_(reinterpret_cast<const char*>(data), size) {}

  std::uint8_t Byte() {
    if (bytes_.empty()) return 0;
    const auto byte = static_cast<std::uint8_t>(bytes_[0]);
    bytes_.remove_prefix(1);
    return byte;
  }
  // A number of [low, high].
  std::uint32_t Number(std::uint32_t low, std::uint32_t high) {
    const std::uint32_t low_byte = Byte();
    const std::uint32_t bits = low_byte | std::uint32_t{Byte()} << 8;
    return low + bits % (high - low + 1);
  }
  bool empty() const { return bytes_.empty(); }

  // The rest as a text of up to kMostText bytes, perhaps not UTF-8. Bytes stand for themselves, but
  // after 0xFE (which UTF-8 never has) one byte gives a length L of 1 to 8 and two a count: the L
  // bytes that follow stand for so many of them. So a few bytes of input are a long run.
  static constexpr std::size_t kMostText = std::size_t{1} << 18;
  std::string Text() {
    std::string text;
    while (!bytes_.empty() && text.size() < kMostText) {
      if (bytes_[0] != '\xFE') {
        text += bytes_[0];
        bytes_.remove_prefix(1);
        continue;
      }
      bytes_.remove_prefix(1);
      const std::size_t length = 1 + Byte() % 8;
      const std::uint32_t count = Number(0, 0xFFFF);
      const std::string_view unit = bytes_.substr(0, length);
      for (std::uint32_t i = 0; i < count && text.size() < kMostText; ++i) text.append(unit);
      bytes_.remove_prefix(unit.size());
    }
    text.resize(std::min(text.size(), kMostText));
    return text;
  }
  std::string Utf8Text() { return ReplaceIllFormed(Text()); }

 private:
  std::string_view bytes_;
};

// Stops the fuzzer if the processor time of this process between construction and destruction is
// out of proportion to the size of a text, mended: an ill-formed byte becomes three. The factor is
// several times what the slowest text was seen to take with sanitizers on a busy machine; a text of
// 256 KiB whose time is quadratic takes far more.
class TimeLimit {
 public:
  explicit TimeLimit(std::string_view text)
      : limit_(1.0 + 30e-6 * static_cast<double>(ReplaceIllFormed(text).size())) {}
  ~TimeLimit() { Require(Now() - start_ < limit_, "too much time for so short a text"); }
  TimeLimit(const TimeLimit&) = delete;
  TimeLimit& operator=(const TimeLimit&) = delete;

 private:
  static double Now() {
    timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

  const double limit_;
  const double start_ = Now();
};

}  // namespace mvbert

#endif  // MVBERT_TESTS_FUZZ_INPUT_H_
