// Text to word ids, on all cores: documents go in, blocks of word ids come out in the order of the
// text, and a lexicon grows on the side.
//
//   caller:   text -> documents (a blank line ends one, or the caller says so) -> blocks of ~1 MiB
//   workers:  block -> words -> ids; words not met before go to the one lexicon, under a lock
//   caller:   finished blocks, in order
//
// A block ends at ASCII white space, where splitting text in two changes no word. So memory is the
// lexicon, a few blocks for each worker, and the longest run of text without white space.
//
// Time is linear in the bytes taken in: every loop over text takes some of it away, and a byte
// behind the last white space is moved to the next block once at most.
//
// Ids are provisional: which id a word gets depends on which worker came first. Lexicon::Order()
// makes the final ones, which do not depend on it; nor does anything else that comes out of here.

#ifndef MVBERT_CORPUS_BUILDER_H_
#define MVBERT_CORPUS_BUILDER_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "lexicon.h"
#include "words.h"

namespace mvbert {

// Text that is not UTF-8, at this byte of this source (as numbered by BeginSource).
class NotUtf8 : public std::invalid_argument {
 public:
  NotUtf8(std::uint32_t source, std::uint64_t offset)
      : std::invalid_argument("not UTF-8"), source(source), offset(offset) {}
  const std::uint32_t source;
  const std::uint64_t offset;
};

// True for the documents that a share of [0, 1] holds out: a draw for (seed, document) alone.
class HeldOutDraw {
 public:
  HeldOutDraw(double share, std::uint64_t seed);
  // The draw itself, uniform over 32 bits; the smallest are held out first.
  static std::uint32_t Draw(std::uint64_t seed, std::uint64_t document);
  // Those of documents [0, count).
  static std::vector<std::uint32_t> Draws(std::uint64_t seed, std::size_t count);
  bool operator()(std::uint64_t document) const { return Draw(seed_, document) < below_; }

 private:
  std::uint64_t below_;  // share * 2^32
  std::uint64_t seed_;
};

enum class Destination { kByDraw, kTrain, kHeldOut };

struct CorpusOptions {
  SplitOptions split;
  double heldout_share = 0;
  std::uint64_t seed = 0;
  bool replace = false;               // drop bytes that are not UTF-8 instead of throwing
  int threads = 1;                    // workers, at least 1
  std::size_t block_bytes = 1 << 20;  // results do not depend on it
};

// What came of the text between two calls of Take. Word ids are provisional.
struct Streams {
  std::vector<std::vector<std::uint32_t>> train;  // end to end, a piece for each block
  std::vector<std::vector<std::uint32_t>> heldout;
};

struct CorpusTotals {
  std::uint64_t bytes = 0;      // text taken in, blank lines included
  std::uint64_t documents = 0;  // documents met, empty ones included: the number of the next one
  std::uint64_t train_documents = 0;  // with at least one word
  std::uint64_t heldout_documents = 0;
  std::uint64_t train_words = 0;  // without the marks
  std::uint64_t heldout_words = 0;
  std::uint64_t replaced = 0;  // runs of bytes that were not UTF-8
};

// One caller at a time. After a method has thrown, only the destructor may be called.
class CorpusBuilder {
 public:
  explicit CorpusBuilder(const CorpusOptions& options);
  ~CorpusBuilder();
  CorpusBuilder(const CorpusBuilder&) = delete;
  CorpusBuilder& operator=(const CorpusBuilder&) = delete;

  // What follows is a new source (a file), from byte `offset` of its text: ends the open document.
  // Errors name the source.
  void BeginSource(std::uint32_t source, Destination destination, std::uint64_t offset = 0);

  // More of the source's plain text; a line of ASCII white space alone ends a document. Calls need
  // not agree with lines or characters. Waits while all workers are busy and their queue is full.
  // Throws NotUtf8 for text of this or an earlier call.
  void AddText(std::string_view text);

  // Whole documents, blank lines and all: document i is text[ends[i - 1], ends[i]). Throws
  // std::invalid_argument if the ends do not ascend within the text.
  void AddDocuments(std::string_view text, const std::uint64_t* ends, std::size_t count);

  // Ends the open document and waits until all text is ids.
  void Flush();

  // Where to resume: the text before is ids, or will be after the next Take.
  struct PausePoint {
    std::uint64_t offset;     // in the text of the source
    std::uint64_t documents;  // before it, as in CorpusTotals
    std::uint64_t bytes;      // before it, as in CorpusTotals
  };

  // Waits until all text up to the last end of a document is ids. After the next Take, what was
  // taken so far, the lexicon and the totals (but for those of the pause point) are a state for
  // Restore. False, and nothing is done, while the open document is longer than a block.
  bool Pause(PausePoint* point);

  // Goes on from a state of an earlier builder, before any text: its words, each followed by a line
  // break, in the order of their ids from 1; the train stream; its totals.
  void Restore(std::string_view words, const std::uint32_t* train, std::size_t train_size,
               const CorpusTotals& totals);

  // The ids that are ready, in the order of the text. Throws what a worker threw.
  Streams Take();

  // Counts of what Take has handed out (bytes and documents: of what was taken in).
  const CorpusTotals& totals() const { return totals_; }

  // Precondition: Flush was called or Pause returned true, and nothing was added since.
  Lexicon& lexicon() { return lexicon_; }

 private:
  struct Segment;
  struct Block;
  struct Result;
  class Worker;

  void AddDocument(std::string_view text);
  void Append(std::string_view text);
  void CloseDocument();
  void OpenDocument();
  void CutBlock();
  void Wait();
  void Work();

  const CorpusOptions options_;
  const WordSplitter splitter_;
  const HeldOutDraw held_out_;

  // The caller's side.
  CorpusTotals totals_;
  Destination destination_ = Destination::kByDraw;
  std::uint32_t source_ = 0;
  std::uint64_t source_offset_ = 0;  // of the end of open_'s text in the source
  std::unique_ptr<Block> open_;      // text not handed to a worker yet
  std::size_t safe_cut_ = 0;         // one past its last white space or document; 0: none
  bool line_is_blank_ = true;        // so far
  bool document_is_open_ = false;    // it has text
  bool taken_words_ = false;         // the document open at the end of what Take gave has words
  std::uint64_t submitted_ = 0;
  std::uint64_t taken_ = 0;

  // Shared, under mutex_.
  std::mutex mutex_;
  std::condition_variable work_;  // a block was queued, or stop_
  std::condition_variable done_;  // a block was taken from the queue, or finished
  std::deque<std::unique_ptr<Block>> queue_;
  std::map<std::uint64_t, std::unique_ptr<Result>> results_;  // by the block's number
  bool stop_ = false;

  // Shared, under lexicon_mutex_.
  std::mutex lexicon_mutex_;
  Lexicon lexicon_;

  std::vector<std::thread> threads_;
};

}  // namespace mvbert

#endif  // MVBERT_CORPUS_BUILDER_H_
