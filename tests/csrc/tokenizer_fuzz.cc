// libFuzzer: any bytes must give the same words and ids by every route.

#include "tokenizer_fuzz.h"

#include <cstddef>
#include <cstdint>
#include <string>

#include "fuzz_input.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  mvbert::AllFuzzTokenizers();
  const std::string text = mvbert::FuzzInput(data, size).Text();
  const mvbert::TimeLimit limit(text);
  mvbert::CheckText(text);
  return 0;
}
