// libFuzzer: any bytes must give the same words and ids by every route.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tokenizer_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  mvbert::CheckText(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}
