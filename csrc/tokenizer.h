// Text -> piece ids, under one vocabulary or mixed under two.
//
// Words are looked up in a PieceCache, which holds the vocabularies' own words at first and belongs
// to one call at a time: results never depend on it. Between calls a Tokenizer keeps a cache for
// each thread that was at work at once, and up to 64 buffers of 512 KiB.
//
// Every loop over text ends, since WordSplitter::Fill reads on whatever it is given, and takes time
// linear in the bytes; recognising special pieces takes their number and length as a factor.
//
// A Tokenizer is immutable to its callers: any number of threads may use one. There is no lock and
// no thread that outlives a call, so a forked child can go on using it.

#ifndef MVBERT_TOKENIZER_H_
#define MVBERT_TOKENIZER_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "id_buffer.h"
#include "piece_cache.h"
#include "special_pieces.h"
#include "wordpiece.h"
#include "words.h"

namespace mvbert {

// Which vocabulary cuts which word: word w of text number t is cut by the student's when the w-th
// number that text t has for Purpose::kText is below `threshold`. The numbers lie as the mixer's
// do: 64 from 16 Philox blocks, first words first (`drawn` in mvbert/text/row_reference.py).
struct Coin {
  std::uint64_t threshold = 0;  // student_prob * 2^32, rounded to nearest: 0 never, 2^32 always
  std::uint64_t seed = 0;
};

struct TextOptions {
  bool find_special = false;  // recognise special pieces inside text; their ids are the teacher's
  // Enough ids of a text: reading may stop there. Its first `limit` ids are right.
  std::uint64_t limit = ~std::uint64_t{0};
  bool spans = false;  // where pieces lie too; without a coin
  Coin coin;
};

// The ids of several texts, one after another: text i has ids[ends[i - 1], ends[i]).
struct Encoding {
  IdBuffer ids;
  IdBuffer spans;  // of each id, if asked for: begin and end in code points of the text, half-open
  std::vector<std::uint64_t> ends;
};

// Where words begin, for one text: word w has ids[starts[w], starts[w + 1]), the last one the rest.
struct WordMap {
  std::vector<std::uint32_t> starts;
  std::vector<std::uint8_t> from_student;
};

class Tokenizer {
 public:
  // Ids are the teacher's, or teacher.size() + the student's. `student` may be null. `special` are
  // the strings that Encode recognises in text when asked to.
  Tokenizer(SplitOptions options, std::shared_ptr<const WordPiece> teacher,
            std::shared_ptr<const WordPiece> student, const std::vector<SpecialPiece>& special);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Appends the ids of each text, in order, to *out. The texts must be well-formed UTF-8; text i is
  // number first_number + i for the coin. `threads` >= 1 bounds the threads used; the ids do not
  // depend on it. No [CLS] or [SEP] is added.
  void Encode(const std::vector<std::string_view>& texts, const TextOptions& options,
              std::uint64_t first_number, int threads, Encoding* out) const;

  // The same as parts, each of consecutive texts, as the threads made them: nothing is joined. The
  // ends of a part count from its own first id. Spans are those of EncodeSpans. If `rows` is given,
  // ascending, parts end at these numbers of texts only.
  void EncodeParts(const std::vector<std::string_view>& texts, const TextOptions& options,
                   std::uint64_t first_number, int threads, std::vector<Encoding>* parts,
                   const std::vector<std::uint64_t>* rows = nullptr) const;

  // Takes the memory of such parts back, for later calls: malloc may give so much back to the
  // system, and then the next call meets a page fault every 4 KiB.
  void Recycle(std::vector<Encoding>* parts) const;

  // Moves what such parts have into memory of its size where they fill less than half of theirs,
  // which later calls may use: for parts that are kept.
  void Shrink(std::vector<Encoding>* parts) const;

  // The same as Encode for one text on one thread, with its words unless `words` is null.
  void EncodeWords(std::string_view text, const TextOptions& options, std::uint64_t number,
                   IdBuffer* ids, WordMap* words) const;

  // One long text, plain (teacher's pieces), on several threads: it is cut at spaces, where no word
  // and no special piece can stretch across.
  void EncodeLong(std::string_view text, bool find_special, int threads, IdBuffer* ids) const;

  // The ids of one text under the teacher's vocabulary and where each piece lies in the text (as in
  // Encoding). A piece spans from the first to the last character it has letters of.
  void EncodeSpans(std::string_view text, bool find_special, IdBuffer* ids, IdBuffer* spans) const;

  // By teacher's id: 1 where the piece begins a word, 0 where it continues one.
  const std::vector<std::uint8_t>& begins_word() const { return begins_word_; }

  // Lets go of what calls have learnt (not of the vocabulary's own words): for measuring.
  void ForgetWords() const;

 private:
  class Worker;
  class Lease;

  static constexpr std::size_t kPartIds = std::size_t{1} << 17;  // room in a part for a start

  void CheckCoin(const Coin& coin) const;

  // An empty buffer of kPartIds, one that Recycle has kept if there is one.
  IdBuffer TakeBuffer() const;

  // SpecialPieces::Split, or the whole text as one stretch unless `find_special`.
  template <typename Found>
  void SplitAtSpecial(std::string_view text, bool find_special, Found&& found) const;

  const WordSplitter splitter_;
  const std::shared_ptr<const WordPiece> teacher_;
  const std::shared_ptr<const WordPiece> student_;
  const SpecialPieces special_;
  std::unique_ptr<const PieceCache> seeds_;
  std::vector<std::uint8_t> begins_word_;  // by teacher's id
  std::vector<std::uint32_t> letters_;     // by teacher's id: bytes without the ## in front
  mutable std::array<std::atomic<Worker*>, 64> idle_{};           // workers that no call is using
  mutable std::array<std::atomic<std::int32_t*>, 64> buffers_{};  // of kPartIds, unused
};

}  // namespace mvbert

#endif  // MVBERT_TOKENIZER_H_
