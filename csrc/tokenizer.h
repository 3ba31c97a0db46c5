// Text -> piece ids, under one vocabulary or mixed under two.
//
// Words are looked up in a cache whose 32-byte slot holds a word of up to 16 bytes and its pieces under
// both vocabularies, so a mixed text costs what a plain one does. A word that is not there is cut by
// the tries and remembered. The cache is bounded (8 MiB, and 4 MiB for longer words), filled with the
// vocabulary's own whole words at first, and belongs to one call at a time: results never depend on
// it. Between calls a Tokenizer keeps a cache for each thread that was at work at once, and up to 64
// buffers of 512 KiB.
//
// Every loop over text ends, since WordSplitter::Fill reads on whatever it is given, and takes time linear
// in the bytes; recognising special pieces takes their number and length as a factor.
//
// A Tokenizer is immutable to its callers: any number of threads may use one. There is no lock and no
// thread that outlives a call, so a forked child can go on using it.

#ifndef MVBERT_TOKENIZER_H_
#define MVBERT_TOKENIZER_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "wordpiece.h"
#include "words.h"

namespace mvbert {

// Which vocabulary cuts which word: word w of text number t is cut by the student's when the w-th
// number that text t has for Purpose::kText is below `threshold`. The numbers lie as the mixer's do:
// 64 from 16 Philox blocks, first words first (`drawn` in mvbert/text/row_reference.py).
struct Coin {
  std::uint64_t threshold = 0;  // student_prob * 2^32, rounded to nearest: 0 never, 2^32 always
  std::uint64_t seed = 0;
};

struct TextOptions {
  bool find_special = false;  // recognise special pieces inside text
  // Enough ids of a text: reading may stop there. Its first `limit` ids are right.
  std::uint64_t limit = ~std::uint64_t{0};
  Coin coin;
};

// A growing array of ids whose new memory is not cleared first.
class IdBuffer {
 public:
  IdBuffer() = default;
  // Takes memory of malloc's with room for `capacity` ids, or null for new memory.
  IdBuffer(std::int32_t* data, std::size_t capacity) : data_(data), capacity_(capacity) {
    if (data_ != nullptr) return;
    data_ = static_cast<std::int32_t*>(std::malloc(capacity * sizeof(std::int32_t)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~IdBuffer() { std::free(data_); }
  IdBuffer(IdBuffer&& other) noexcept { *this = std::move(other); }
  IdBuffer& operator=(IdBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  std::int32_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  std::int32_t* end() const { return data_ + size_; }
  void SetEnd(const std::int32_t* end) { size_ = static_cast<std::size_t>(end - data_); }

  // Room for `more` ids past the end.
  void Reserve(std::size_t more) {
    if (size_ + more <= capacity_) return;
    const std::size_t capacity = size_ + more + (size_ + more) / 2 + 1024;
    void* data = std::realloc(data_, capacity * sizeof(std::int32_t));
    if (data == nullptr) throw std::bad_alloc();
    data_ = static_cast<std::int32_t*>(data);
    capacity_ = capacity;
  }
  void Append(const std::int32_t* ids, std::size_t count) {
    if (count == 0) return;
    Reserve(count);
    std::memcpy(end(), ids, count * sizeof(std::int32_t));
    size_ += count;
  }
  // The memory, to be freed with std::free; this is then empty.
  std::int32_t* Release() {
    std::int32_t* data = data_;
    data_ = nullptr;
    size_ = capacity_ = 0;
    return data;
  }

 private:
  std::int32_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

// The ids of several texts, one after another: text i has ids[ends[i - 1], ends[i]).
struct Encoding {
  IdBuffer ids;
  std::vector<std::uint64_t> ends;
};

// Where words begin, for one text: word w has ids[starts[w], starts[w + 1]), the last one the rest.
struct WordMap {
  std::vector<std::uint32_t> starts;
  std::vector<std::uint8_t> from_student;
};

// A piece of a text in code points of the text, half-open.
struct Span {
  std::uint32_t begin;
  std::uint32_t end;
};

// A string that Encode recognises in text when asked to. Normalised: in whatever the splitter makes
// it of, such as another case; else only as it is written. The latter are found first.
struct SpecialPiece {
  std::string piece;
  std::int32_t id;
  bool normalized;
};

class Tokenizer {
 public:
  // Ids are the teacher's, or teacher.size() + the student's. `student` may be null.
  Tokenizer(SplitOptions options, std::shared_ptr<const WordPiece> teacher,
            std::shared_ptr<const WordPiece> student, std::vector<SpecialPiece> special);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Appends the ids of each text, in order, to *out. The texts must be well-formed UTF-8; text i is
  // number first_number + i for the coin. `threads` >= 1 bounds the threads used; the ids do not
  // depend on it. No [CLS] or [SEP] is added.
  void Encode(const std::vector<std::string_view>& texts, const TextOptions& options,
              std::uint64_t first_number, int threads, Encoding* out) const;

  // The same as parts, each of consecutive texts, as the threads made them: nothing is joined. The
  // ends of a part count from its own first id.
  void EncodeParts(const std::vector<std::string_view>& texts, const TextOptions& options,
                   std::uint64_t first_number, int threads, std::vector<Encoding>* parts) const;

  // Takes the memory of such parts back, for later calls: malloc may give so much back to the system,
  // and then the next call meets a page fault every 4 KiB.
  void Recycle(std::vector<Encoding>* parts) const;

  // The same as Encode for one text on one thread, with its words unless `words` is null.
  void EncodeWords(std::string_view text, const TextOptions& options, std::uint64_t number,
                   IdBuffer* ids, WordMap* words) const;

  // One long text, plain (teacher's pieces), on several threads: it is cut at spaces, where no word
  // and no special piece can stretch across.
  void EncodeLong(std::string_view text, bool find_special, int threads, IdBuffer* ids) const;

  // The ids of one text under the teacher's vocabulary and where each piece lies in the text. A
  // piece spans from the first to the last character it has letters of. Slower: no cache.
  void EncodeSpans(std::string_view text, bool find_special, IdBuffer* ids,
                   std::vector<Span>* spans) const;

  // Lets go of what calls have learnt (not of the vocabulary's own words): for measuring.
  void ForgetWords() const;

 private:
  class Cache;
  class Worker;
  class Lease;

  static constexpr std::size_t kPartIds = std::size_t{1} << 17;  // room in a part for a start

  void CheckCoin(const Coin& coin) const;

  // An empty buffer of kPartIds, one that Recycle has kept if there is one.
  IdBuffer TakeBuffer() const;

  // Calls found(text, -1) for stretches between special pieces and found(text, id) for these, until
  // it gives false.
  template <typename Found>
  void SplitAtSpecial(std::string_view text, bool find_special, Found&& found) const;

  // The same for the normalised ones, in a stretch without others. O(size x longest x pieces), one
  // look at each byte where none of them can begin.
  template <typename Found>
  bool SplitAtNormalized(std::string_view text, Found&& found) const;
  std::size_t NormalizedAt(std::string_view text, std::size_t at, std::int32_t* id) const;

  std::size_t SpecialAt(std::string_view text, std::size_t at, std::int32_t* id) const;
  std::size_t CleanedSpecialAt(std::string_view text, std::size_t begin, std::size_t at,
                               std::int32_t* id) const;

  const WordSplitter splitter_;
  const std::shared_ptr<const WordPiece> teacher_;
  const std::shared_ptr<const WordPiece> student_;
  std::vector<SpecialPiece> special_;     // looked for as they are written
  std::vector<SpecialPiece> normalized_;  // `piece` is normalised
  std::string special_bytes_;             // what special_ begin with
  std::array<bool, 256> normalized_bytes_{};  // what text may begin with that becomes normalized_
  std::unique_ptr<const Cache> seeds_;
  mutable std::array<std::atomic<Worker*>, 64> idle_{};  // workers that no call is using
  mutable std::array<std::atomic<std::int32_t*>, 64> buffers_{};  // of kPartIds, unused
};

}  // namespace mvbert

#endif  // MVBERT_TOKENIZER_H_
