// What the fuzz targets share: bytes as numbers, texts and a failure that stops the fuzzer.

#ifndef MVBERT_TESTS_FUZZ_INPUT_H_
#define MVBERT_TESTS_FUZZ_INPUT_H_

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
    const std::uint32_t bits = Byte() | std::uint32_t{Byte()} << 8;
    return low + bits % (high - low + 1);
  }
  bool empty() const { return bytes_.empty(); }
  std::string_view Rest() const { return bytes_; }
  std::string RestAsUtf8() const { return ReplaceIllFormed(bytes_); }

 private:
  std::string_view bytes_;
};

}  // namespace mvbert

#endif  // MVBERT_TESTS_FUZZ_INPUT_H_
