// The fuzzer's property on random texts, and threads sharing one tokenizer: for sanitized builds.
//
//   tokenizer_check [texts]

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tokenizer_fuzz.h"
#include "unicode.h"

namespace {

std::string RandomText(std::mt19937_64* random) {
  static const char* const kUsual[] = {"a",
                                       "B",
                                       "hello ",
                                       "HELLO\xCC\x88",
                                       "The",
                                       " ",
                                       "\n",
                                       "!",
                                       ".",
                                       "[MASK]",
                                       "[",
                                       "<",
                                       "\xC3\xA9",
                                       "\xCC\x81",
                                       "\xCC\xB8",
                                       "\xE4\xB8\xAD",
                                       "\xE2\x80\x8B",
                                       "\xED\x95\x9C",
                                       "\xE1\x84\x92\xE1\x85\xA1",
                                       "\xE2\x80\xA8"};
  std::string text;
  const std::size_t length = (*random)() % ((*random)() % 10 == 0 ? 3000 : 150);
  const std::uint64_t kind = (*random)() % 4;
  while (text.size() < length) {
    const std::uint64_t draw = (*random)();
    if (kind == 0) {
      text += static_cast<char>(draw);  // mostly not UTF-8
    } else if (kind == 1 || draw % 8 != 0) {
      text += kUsual[(draw >> 8) % std::size(kUsual)];
    } else {
      char32_t c = static_cast<char32_t>((draw >> 8) % 0x110000);
      if (c >= 0xD800 && c < 0xE000) c = 'x';
      char utf8[4];
      text.append(utf8, mvbert::EncodeUtf8(c, utf8));
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const long texts = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 2000;
  std::mt19937_64 random(0);
  for (long i = 0; i < texts; ++i) mvbert::CheckText(RandomText(&random));
  const auto length = static_cast<std::size_t>(500 * texts);
  mvbert::CheckText(std::string(length, 'a'));
  mvbert::CheckText(std::string(length / 10, '!') + std::string(length / 10, '\0'));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, texts] {
      std::mt19937_64 mine(static_cast<std::uint64_t>(t) + 1);
      for (long i = 0; i < texts / 10; ++i) mvbert::CheckText(RandomText(&mine));
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("ok: %ld texts\n", texts);
  return 0;
}
