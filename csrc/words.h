// Text -> words: BERT's cleaning, normalisation and splitting.
//
// The definition is what Hugging Face's slow BertTokenizer (transformers 4.57) does before
// WordPiece, with the Unicode tables pinned to 14.0.0 and with no special tokens: control, private,
// unassigned characters and U+FFFD are deleted; whitespace separates; ideographs and punctuation
// marks are words of their own; uncased text is lower-cased character by character and loses its
// accents (NFD without Mn), other text keeps them and is composed (NFC). mvbert/text/wordpiece.py
// is the same in plain Python.
//
// A WordSplitter is immutable: any number of threads may use one, each with its own WordBatch.

#ifndef MVBERT_WORDS_H_
#define MVBERT_WORDS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ascii_run.h"
#include "unicode.h"

namespace mvbert {

struct SplitOptions {
  bool lowercase = true;
  bool strip_accents = true;  // of lower-cased text; cased text keeps its accents
};

// Flat words: word i is bytes[ends[i - 1], ends[i]), with ends[-1] = 0.
struct Words {
  std::string bytes;
  std::vector<std::uint32_t> ends;
};

// A reusable buffer of some thousand normalised words. Each word's bytes can be read up to
// kPadding bytes past its end, so that fixed-width loads need no care.
class WordBatch {
 public:
  static constexpr std::size_t kPadding = 64;
  static constexpr std::size_t kTarget = 16384;  // stays in the first-level cache with its words

  WordBatch() = default;
  WordBatch(const WordBatch&) = delete;
  WordBatch& operator=(const WordBatch&) = delete;

  // Complete words. Word i is [bytes() + start(i), bytes() + end(i)).
  std::size_t size() const { return word_count_; }
  const char* bytes() const { return bytes_.data(); }
  std::uint32_t start(std::size_t i) const { return starts_[i]; }
  std::uint32_t end(std::size_t i) const { return ends_[i]; }
  const std::uint32_t* starts() const { return starts_.data(); }
  const std::uint32_t* ends() const { return ends_.data(); }
  std::string_view operator[](std::size_t i) const {
    return {bytes_.data() + starts_[i], ends_[i] - starts_[i]};
  }

  // Asks for the source of every byte, or no longer, from the next Fill on; the batch is empty.
  void TrackSources(bool track = true) { track_ = track; }

  // The smallest stretch of code points of the text that has all that the bytes [from, to) of
  // bytes() came from, to > from. Counted from the start of the text, or from the last
  // RestartSources(). The first and the last byte say it unless canonical ordering has moved some.
  template <bool kAscend>
  struct Sources {
    const std::uint32_t* of;  // by byte
    std::uint32_t begin(std::uint32_t from, std::uint32_t to) const {
      return kAscend ? of[from] : *std::min_element(of + from, of + to);
    }
    std::uint32_t end(std::uint32_t from, std::uint32_t to) const {
      return (kAscend ? of[to - 1] : *std::max_element(of + from, of + to)) + 1;
    }
  };
  // Calls use(Sources) with the sources of the batch, of whichever kind they are.
  template <typename Use>
  void WithSources(Use&& use) const {
    if (reordered_) {
      use(Sources<false>{sources_.data()});
    } else {
      use(Sources<true>{sources_.data()});
    }
  }
  void RestartSources(std::uint32_t at) { source_at_ = at; }
  std::uint32_t source_at() const { return source_at_; }

  // Time to use the complete words and to Clear, even where there are none: blanks fill a batch
  // too. (A word still open does not count: it may be any length.)
  bool full() const { return closed_bytes() >= target(); }

  // Forgets the complete words; keeps a word that is still being read.
  void Clear();

  // Forgets the word that is still being read: the caller wants no more of its text.
  void DropOpen() {
    if (open_) byte_count_ = starts_[word_count_];
    open_ = false;
  }

 private:
  friend class WordSplitter;
  template <Casing kCasing, bool kTrack>
  friend class Filler;

  // (A byte's source takes four: so a batch of them stays in that cache, too.)
  std::size_t target() const { return track_ ? kTarget / 4 : kTarget; }
  std::size_t closed_bytes() const { return open_ ? starts_[word_count_] : byte_count_; }

  // Makes room for `more` bytes and as many words, and the padding.
  void Reserve(std::size_t more);

  std::vector<char> bytes_;
  std::vector<std::uint32_t> starts_;
  std::vector<std::uint32_t> ends_;
  // While tracking, the code point that each byte came from; of the bytes of a composite the last
  // one has the last. (A composite of several is not ASCII, so it has a byte for either end.)
  std::vector<std::uint32_t> sources_;
  std::uint32_t source_at_ = 0;  // code points read so far
  bool track_ = false;
  bool reordered_ = false;  // sources may not ascend
  std::size_t byte_count_ = 0;
  std::size_t word_count_ = 0;
  bool open_ = false;  // starts_[word_count_] is the start of a word whose end is not known
};

class WordSplitter {
 public:
  // `ascii` is how plain text is read: the same words for each, so only tests name another.
  explicit WordSplitter(SplitOptions options, const AsciiRunChoice& ascii = FastestAsciiRun())
      : options_(options), ascii_(ascii) {}

  const SplitOptions& options() const { return options_; }

  // Appends the words of `utf8` to *out. Throws std::invalid_argument naming the offset of the
  // first ill-formed byte, and std::length_error past 4 GiB of words; *out is then unchanged or has
  // a prefix of the words.
  void Split(std::string_view utf8, Words* out) const;

  // Calls sink(std::string_view word) for each word, in order. The view lives until the sink
  // returns. `utf8` must be well-formed (see CheckUtf8), here and below.
  template <typename Sink>
  void ForEachWord(std::string_view utf8, WordBatch* batch, Sink&& sink) const {
    std::size_t at = 0;
    do {
      at = Fill(utf8, at, batch);
      for (std::size_t i = 0; i < batch->size(); ++i) sink((*batch)[i]);
      batch->Clear();
    } while (at < utf8.size());
  }

  // Appends the words of utf8[from, size) to *batch until it is full, or has about `most` bytes
  // more, or the text ends, and returns where it stopped. When that is the end of the text, the
  // last word is complete too. Otherwise the caller calls again with the returned position, after
  // using the words and batch->Clear() if it is full.
  //
  // Reads a code point at least unless the text has ended, whatever the batch holds, so a loop that
  // calls Fill until the end of the text ends. Time is linear in the bytes read, whatever they are.
  std::size_t Fill(std::string_view utf8, std::size_t from, WordBatch* batch,
                   std::size_t most = WordBatch::kTarget) const;

 private:
  SplitOptions options_;
  AsciiRunChoice ascii_;
};

}  // namespace mvbert

#endif  // MVBERT_WORDS_H_
