// Counts the work of encoding and of building a corpus on long runs of every kind of character, and
// of one kind among another: four times the text must be about four times the work.
//
// Work is counted, not timed: the core is compiled so that it calls a function here at every step
// of its control flow (-fsanitize-coverage=trace-pc), and calls of memcpy and its like are counted
// by their size (the linker's --wrap). Exit status 0 if all is well; prints the worst ratio.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "corpus_builder.h"
#include "token_rows.h"
#include "tokenizer.h"
#include "unicode.h"
#include "wordpiece.h"
#include "words.h"

namespace {

std::atomic<std::uint64_t> steps{0}, most_steps{~std::uint64_t{0}};
std::string job_name, text_name;  // of what is being done

// Steps of this thread that are not in `steps` yet. (What a thread leaves here at its end is lost: far
// less than what is allowed.)
thread_local std::uint64_t fresh = 0;

void Flush() {
  const std::uint64_t more = fresh;
  fresh = 0;
  if (steps.fetch_add(more, std::memory_order_relaxed) + more <= most_steps) return;
  most_steps = ~std::uint64_t{0};
  std::printf("linear_work: more than linear: %s, text: %s\n", job_name.c_str(), text_name.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

void Add(std::uint64_t more) {
  fresh += more;
  if (fresh >= 1000) Flush();
}

void Count(std::size_t bytes) { Add(1 + bytes / 16); }

}  // namespace

extern "C" {
void __sanitizer_cov_trace_pc() { Add(1); }

void* __real_memcpy(void* to, const void* from, std::size_t size);
void* __real_memmove(void* to, const void* from, std::size_t size);
void* __real_memset(void* to, int byte, std::size_t size);
const void* __real_memchr(const void* in, int byte, std::size_t size);
void* __wrap_memcpy(void* to, const void* from, std::size_t size) {
  Count(size);
  return __real_memcpy(to, from, size);
}
void* __wrap_memmove(void* to, const void* from, std::size_t size) {
  Count(size);
  return __real_memmove(to, from, size);
}
void* __wrap_memset(void* to, int byte, std::size_t size) {
  Count(size);
  return __real_memset(to, byte, size);
}
const void* __wrap_memchr(const void* in, int byte, std::size_t size) {
  const void* found = __real_memchr(in, byte, size);
  Count(found == nullptr ? size
                         : static_cast<std::size_t>(static_cast<const char*>(found) -
                                                    static_cast<const char*>(in)));
  return found;
}
}

namespace {

using namespace mvbert;

struct Kind {
  const char* name;
  const char* bytes;
};

constexpr Kind kKinds[] = {
    {"space", " "},
    {"line break", "\n"},
    {"ideographic space", "\u3000"},
    {"punctuation", "!"},
    {"opening bracket", "["},
    {"special piece", "[MASK]"},
    {"other punctuation", "\u201C"},
    {"ideograph", "\u4E2D"},
    {"letter", "a"},
    {"capital", "A"},
    {"accented letter", "\u00E9"},
    {"Hangul syllable", "\uD55C"},
    {"Hangul jamo", "\u1112\u1161"},
    {"accent", "\u0301"},
    {"accents out of order", "\u0301\u0323"},
    {"mark that stays", "\U0001D165"},
    {"overlay for < and =", "=\u0338"},
    {"control", "\x01"},
    {"zero-width space", "\u200B"},
    {"not UTF-8", "\xFF"},
    {"half a character", "\xE4\xB8"},
};

std::string Run(std::string_view unit, std::size_t bytes) {
  std::string run;
  while (run.size() < bytes) run.append(unit);
  return run;
}

// Work on a text, as a function of the text.
struct Job {
  const char* name;
  bool any_bytes;  // the text need not be UTF-8
  bool always;     // for every text; the others for one kind alone
  std::function<void(std::string_view)> work;
};

struct Side {
  explicit Side(SplitOptions options)
      : splitter(options),
        pieces(std::make_shared<WordPiece>(
            std::vector<std::string>{"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "!",
                                     "[", "\u4E2D", "word"},
            1)),
        plain(options, pieces, nullptr,
              {{"[MASK]", 4, false}, {"[SEP]", 3, false}, {"aab", 10, true}, {"\u00E9a", 9, true}}),
        mixed(options, pieces, pieces, {}) {}
  WordSplitter splitter;
  std::shared_ptr<const WordPiece> pieces;
  Tokenizer plain, mixed;
};

void BuildCorpus(std::string_view text, std::size_t step) {
  CorpusOptions options;
  options.replace = true;
  options.block_bytes = 4000;
  CorpusBuilder builder(options);
  builder.BeginSource(0, Destination::kTrain);
  for (std::size_t at = 0; at < text.size(); at += step) builder.AddText(text.substr(at, step));
  builder.Flush();
  builder.Take();
}

std::vector<Job> Jobs(const Side& uncased, const Side& cased, const Side& accented) {
  std::vector<Job> jobs;
  for (const Side* side : {&uncased, &cased, &accented}) {
    jobs.push_back({"encode", false, side == &cased, [side](std::string_view text) {
                      TextOptions options;
                      options.find_special = true;
                      Encoding encoding;
                      side->plain.Encode({text}, options, 0, 1, &encoding);
                    }});
    jobs.push_back({"spans", false, side == &cased, [side](std::string_view text) {
                      IdBuffer ids, spans;
                      side->plain.EncodeSpans(text, true, &ids, &spans);
                    }});
    jobs.push_back({"words", false, side == &uncased, [side](std::string_view text) {
                      Words words;
                      side->splitter.Split(text, &words);
                    }});
    jobs.push_back({"mixed", false, false, [side](std::string_view text) {
                      TextOptions options;
                      options.coin = {std::uint64_t{1} << 31, 1};
                      IdBuffer ids;
                      WordMap words;
                      side->mixed.EncodeWords(text, options, 0, &ids, &words);
                    }});
    jobs.push_back({"rows", false, false, [side](std::string_view text) {
                      RowOptions options;
                      options.truncation = Truncation::kLongestFirst;
                      options.max_length = 16;
                      TokenRows rows(side->plain, {text, text}, nullptr, options, 1);
                    }});
  }
  jobs.push_back(
      {"corpus", true, true, [](std::string_view text) { BuildCorpus(text, text.size()); }});
  jobs.push_back({"corpus, 100 bytes a call", true, false,
                  [](std::string_view text) { BuildCorpus(text, 100); }});
  jobs.push_back({"mending", true, false, [](std::string_view text) { ReplaceIllFormed(text); }});
  return jobs;
}

// The steps of a job on a text; at most so many.
std::uint64_t Work(const Job& job, const std::string& text, std::uint64_t most) {
  steps = 0;
  most_steps = most;
  job.work(text);
  Flush();
  most_steps = ~std::uint64_t{0};
  return steps;
}

constexpr std::size_t kSize = 20000;  // bytes; more than a WordBatch holds
constexpr std::uint64_t kMostAByte = 2000;

}  // namespace

int main() {
  const Side uncased({true, true}), cased({false, true}), accented({true, false});
  const std::vector<Job> jobs = Jobs(uncased, cased, accented);
  const auto check = [&](const std::string& name, bool alone,
                         const std::function<std::string(std::size_t)>& text_of) {
    const std::string once = text_of(kSize), four_times = text_of(4 * kSize);
    const bool is_utf8 = Utf8ErrorOffset(four_times) == kNoError;
    text_name = name;
    for (const Job& job : jobs) {
      if ((!is_utf8 && !job.any_bytes) || (!alone && !job.always)) continue;
      job_name = job.name;
      // (The first time caches and buffers are made, 8 MiB and more, and those that a tokenizer
      // keeps grow to what the longer text needs.)
      Work(job, four_times, 4 * kMostAByte * kSize + (std::uint64_t{1} << 22));
      const std::uint64_t work = Work(job, once, kMostAByte * kSize);
      // About four times as much. A step a byte is free: a long word of plain ASCII takes a step
      // for 64 bytes and is then mostly the copying of buffers that grow.
      const std::uint64_t more = Work(job, four_times, 4 * work + 4 * work / 10 + 4 * kSize);
      // Where every byte is read, 64 at a time at best, there is work.
      if (more > 4 * kSize / 64) continue;
      std::printf("linear_work: nothing was counted: %s, text: %s\n", job.name, name.c_str());
      std::exit(1);
    }
  };
  for (const Kind& a : kKinds) {
    const std::string name = a.name;
    check(name, true, [&](std::size_t size) { return Run(a.bytes, size); });
    check("a word around " + name, true,
          [&](std::size_t size) { return "a" + Run(a.bytes, size) + "a"; });
    for (const char* other : {"[", "a", "\u0301", "\u200B"}) {
      const std::string pair = name + " and '" + other + "'";
      check(pair + ", in turn", false,
            [&](std::size_t size) { return Run(std::string(a.bytes) + other, size); });
      // As many runs as each is long: what is quadratic in either shows.
      check(pair + ", the first in runs", false, [&](std::size_t size) {
        std::size_t length = 1;
        while (length * length < size) length *= 2;
        return Run(other + Run(a.bytes, length), size);
      });
    }
  }
  std::puts("linear_work: all is linear");
  return 0;
}
