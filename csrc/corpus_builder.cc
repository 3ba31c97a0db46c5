#include "corpus_builder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <system_error>
#include <utility>

#include "philox.h"
#include "unicode.h"

namespace mvbert {

namespace {

constexpr std::size_t kAppendBytes = 1 << 18;  // text taken in before a look at the block's size
constexpr int kTableBits = 17;
constexpr std::size_t kTableSlots = 1 << kTableBits;  // of a worker's table, 32 bytes each
constexpr std::size_t kTableWords = kTableSlots / 2;
constexpr std::size_t kWordsAhead = 16;

// The ASCII white space of BERT's splitter; it deletes form feeds and vertical tabs without a
// trace.
bool IsBlank(char c) { return c == ' ' || c == '\t' || c == '\r'; }
bool IsSpace(char c) { return IsBlank(c) || c == '\n'; }

// One past the last white space of text[0, end), or 0.
std::size_t AfterLastSpace(std::string_view text, std::size_t end) {
  while (end > 0 && !IsSpace(text[end - 1])) --end;
  return end;
}

// The text with every byte that is no part of a UTF-8 sequence left out (as U+FFFD it would be
// removed by the splitter, so it need not be put in).
std::string WithoutErrors(std::string_view text, std::uint64_t* errors) {
  std::string valid;
  valid.reserve(text.size());
  while (!text.empty()) {
    const std::size_t good = Utf8ErrorOffset(text);
    if (good == kNoError) {
      valid.append(text);
      break;
    }
    valid.append(text.substr(0, good));
    ++*errors;
    text.remove_prefix(good + 1);
    while (!text.empty() && (static_cast<unsigned char>(text.front()) & 0xC0) == 0x80) {
      text.remove_prefix(1);
    }
  }
  return valid;
}

}  // namespace

// ---- held-out documents -------------------------------------------------------------------

HeldOutDraw::HeldOutDraw(double share, std::uint64_t seed)
    : below_(static_cast<std::uint64_t>(std::llround(std::ldexp(share, 32)))), seed_(seed) {}

std::uint32_t HeldOutDraw::Draw(std::uint64_t seed, std::uint64_t document) {
  return Philox4x32(
      {static_cast<std::uint32_t>(document), static_cast<std::uint32_t>(Purpose::kHeldOut),
       static_cast<std::uint32_t>(document >> 32), 0},
      PhiloxKey(seed))[0];
}

std::vector<std::uint32_t> HeldOutDraw::Draws(std::uint64_t seed, std::size_t count) {
  std::vector<std::uint32_t> draws(count);
  for (std::size_t document = 0; document < count; ++document) {
    draws[document] = Draw(seed, document);
  }
  return draws;
}

// ---- blocks -------------------------------------------------------------------------------

// A document's text in a block, whole or in part.
struct CorpusBuilder::Segment {
  std::size_t begin, end;       // in the block's text
  std::uint64_t source_offset;  // of `begin`
  std::uint32_t source;
  bool heldout;
  bool continues;  // the document began in an earlier block
  bool ends;       // the document ends here
};

struct CorpusBuilder::Block {
  std::uint64_t number = 0;
  std::string text;
  std::vector<Segment> segments;
};

struct CorpusBuilder::Result {
  std::vector<std::uint32_t> train, heldout;
  std::uint64_t train_documents = 0, heldout_documents = 0;  // marks in train and heldout
  std::uint64_t replaced = 0;
  // The end of a document that has no word in this block. Whether it has a mark depends on whether
  // it had a word before, which only the caller's side knows.
  bool bare_end = false;
  bool bare_end_heldout = false;
  bool open = false;            // the last document continues in the next block
  bool open_has_words = false;  // and has a word here
  bool open_continues = false;  // and began before this block
  std::exception_ptr error;
};

// ---- workers ------------------------------------------------------------------------------

// Splits blocks and gives words their ids. Keeps the words it has met (not all: the table is
// bounded) with their ids, so that only rare words need the common lexicon and its lock.
class CorpusBuilder::Worker {
 public:
  explicit Worker(CorpusBuilder* builder) : builder_(*builder), slots_(kTableSlots) {}

  std::unique_ptr<Result> Process(const Block& block) {
    auto result = std::make_unique<Result>();
    try {
      // English has a word for every five bytes; most of a block goes to one of the two.
      result->train.reserve(block.text.size() / 4);
      for (const Segment& segment : block.segments) Code(block, segment, result.get());
      Commit(result.get());
    } catch (...) {
      result->error = std::current_exception();
    }
    return result;
  }

 private:
  struct Slot {
    std::uint64_t low, high;  // the bytes of a word of up to 16; else its hash and place in long_
    std::uint32_t id;         // 0: the word is in pending_
    std::uint32_t pending;
    std::uint32_t size;  // in bytes; 0: free
  };
  struct Key {
    std::uint64_t low, high;  // as in a slot, but 0 for the place
    std::uint64_t hash;
    std::uint32_t size;
  };
  struct Pending {
    std::uint64_t hash;
    std::size_t begin;  // in pending_bytes_
    std::uint32_t size;
    std::uint32_t slot;  // kTableSlots: not in the table
  };
  struct Place {
    std::size_t at;  // in a stream
    std::uint32_t pending;
  };

  // Appends the words of a segment to its stream, and a mark where the document ends.
  void Code(const Block& block, const Segment& segment, Result* result) {
    auto* ids = segment.heldout ? &result->heldout : &result->train;
    auto* places = segment.heldout ? &heldout_places_ : &train_places_;
    const std::string_view text =
        std::string_view(block.text).substr(segment.begin, segment.end - segment.begin);
    const std::size_t old_size = ids->size();
    const std::size_t error = Utf8ErrorOffset(text);
    if (error == kNoError) {
      CodeWords(text, ids, places);
    } else if (builder_.options_.replace) {
      CodeWords(WithoutErrors(text, &result->replaced), ids, places);
    } else {
      throw NotUtf8(segment.source, segment.source_offset + error);
    }
    const bool has_words = ids->size() > old_size;
    if (segment.ends) {
      if (has_words) {
        ids->push_back(kDocumentMark);
        ++(segment.heldout ? result->heldout_documents : result->train_documents);
      } else if (segment.continues) {
        result->bare_end = true;
        result->bare_end_heldout = segment.heldout;
      }
    } else {
      result->open = true;
      result->open_has_words = has_words;
      result->open_continues = segment.continues;
    }
  }

  // Appends the id of every word of `text`, or 0 and its place where the id is not known yet.
  void CodeWords(std::string_view text, std::vector<std::uint32_t>* ids,
                 std::vector<Place>* places) {
    std::size_t at = 0;
    do {
      at = builder_.splitter_.Fill(text, at, &batch_);
      const std::size_t first = ids->size();
      const std::size_t count = batch_.size();
      ids->resize(first + count);
      std::uint32_t* out = ids->data() + first;
      // The table lies in the outer caches: its slots are asked for some words ahead.
      keys_.resize(count);
      const std::size_t ahead = std::min(count, kWordsAhead);
      for (std::size_t i = 0; i < ahead; ++i) MakeKey(i);
      for (std::size_t i = 0; i < count; ++i) {
        if (i + kWordsAhead < count) MakeKey(i + kWordsAhead);
        const std::uint32_t id = Find(batch_.bytes() + batch_.start(i), keys_[i]);
        out[i] = id;
        if (id == 0) places->push_back({first + i, last_pending_});
      }
      batch_.Clear();
    } while (at < text.size());
  }

  // Makes the key of word i of the batch and asks for its slot.
  void MakeKey(std::size_t i) {
    const char* bytes = batch_.bytes() + batch_.start(i);
    std::size_t size = batch_.end(i) - batch_.start(i);
    Key& key = keys_[i];
    if (size <= 16) {
      ShortWord(bytes, size, &key.low, &key.high);
      key.hash = HashShortWord(key.low, key.high, size);
    } else {
      size = CutWord({bytes, size}).size();
      key.hash = key.low = HashWord({bytes, size});
      key.high = 0;
    }
    key.size = static_cast<std::uint32_t>(size);
    __builtin_prefetch(&slots_[key.hash >> (64 - kTableBits)]);
  }

  // The id of a word, or 0 with last_pending_ set.
  std::uint32_t Find(const char* bytes, const Key& key) {
    const auto& [low, high, hash, size] = key;
    std::size_t at = hash >> (64 - kTableBits);
    for (; slots_[at].size != 0; at = (at + 1) & (kTableSlots - 1)) {
      const Slot& slot = slots_[at];
      if (slot.low != low || slot.size != size) continue;
      if (size <= 16 ? slot.high != high
                     : std::memcmp(long_.data() + slot.high, bytes, size) != 0) {
        continue;
      }
      last_pending_ = slot.pending;
      return slot.id;
    }
    last_pending_ = static_cast<std::uint32_t>(pending_.size());
    const bool full = words_in_table_ == kTableWords;
    pending_.push_back(
        {hash, pending_bytes_.size(), size, static_cast<std::uint32_t>(full ? kTableSlots : at)});
    pending_bytes_.append(bytes, size);
    if (full) {
      ++turned_away_;
    } else {
      slots_[at] = {low, size > 16 ? long_.size() : high, 0, last_pending_, size};
      if (size > 16) long_.append(bytes, size);
      ++words_in_table_;
    }
    return 0;
  }

  // Gives the pending words their ids, puts these in their places, and counts.
  void Commit(Result* result) {
    constexpr std::size_t kAhead = 8;
    {
      const std::lock_guard<std::mutex> lock(builder_.lexicon_mutex_);
      Lexicon& lexicon = builder_.lexicon_;
      for (std::size_t i = 0; i < pending_.size(); ++i) {
        if (i + kAhead < pending_.size()) lexicon.Prefetch(pending_[i + kAhead].hash);
        Pending& word = pending_[i];
        const std::uint32_t id =
            lexicon.Intern({pending_bytes_.data() + word.begin, word.size}, word.hash);
        if (word.slot < kTableSlots) slots_[word.slot].id = id;
        word.size = id;  // its size is not needed any more
      }
      for (const Place& place : train_places_)
        result->train[place.at] = pending_[place.pending].size;
      for (const std::uint32_t id : result->train) lexicon.Count(id, 1);
    }
    for (const Place& place : heldout_places_) {
      result->heldout[place.at] = pending_[place.pending].size;
    }
    const std::size_t words = result->train.size() + result->heldout.size();
    // A table that turns many words away holds the words of another kind of text: start afresh.
    if (turned_away_ > words / 16) {
      std::fill(slots_.begin(), slots_.end(), Slot{});
      long_.clear();
      words_in_table_ = 0;
    }
    turned_away_ = 0;
    pending_.clear();
    pending_bytes_.clear();
    train_places_.clear();
    heldout_places_.clear();
  }

  CorpusBuilder& builder_;
  WordBatch batch_;
  std::vector<Key> keys_;  // of the words of batch_
  std::vector<Slot> slots_;
  std::string long_;
  std::size_t words_in_table_ = 0;
  std::vector<Pending> pending_;
  std::string pending_bytes_;
  std::uint32_t last_pending_ = 0;
  std::uint64_t turned_away_ = 0;
  std::vector<Place> train_places_, heldout_places_;
};

void CorpusBuilder::Work() {
  Worker worker(this);
  while (true) {
    std::unique_ptr<Block> block;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      block = std::move(queue_.front());
      queue_.pop_front();
    }
    done_.notify_all();
    std::unique_ptr<Result> result = worker.Process(*block);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      results_[block->number] = std::move(result);
    }
    done_.notify_all();
  }
}

// ---- the caller's side --------------------------------------------------------------------

CorpusBuilder::CorpusBuilder(const CorpusOptions& options)
    : options_(options),
      splitter_(options.split),
      held_out_(options.heldout_share, options.seed),
      open_(std::make_unique<Block>()) {
  if (options.threads < 1) throw std::invalid_argument("threads must be at least 1");
  if (!(options.heldout_share >= 0 && options.heldout_share < 1)) {
    throw std::invalid_argument("heldout_share must lie in [0, 1)");
  }
  threads_.reserve(options.threads);
  try {
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { Work(); });
  } catch (const std::system_error&) {
    if (threads_.empty()) throw;  // otherwise the threads that did start do the work
  }
}

CorpusBuilder::~CorpusBuilder() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void CorpusBuilder::BeginSource(std::uint32_t source, Destination destination,
                                std::uint64_t offset) {
  CloseDocument();
  source_ = source;
  source_offset_ = offset;
  destination_ = destination;
  line_is_blank_ = true;
}

void CorpusBuilder::AddText(std::string_view text) {
  totals_.bytes += text.size();
  while (!text.empty()) {
    if (line_is_blank_) {
      std::size_t blanks = 0;
      while (blanks < text.size() && IsBlank(text[blanks])) ++blanks;
      if (document_is_open_) {
        Append(text.substr(0, blanks));
      } else {
        source_offset_ += blanks;
      }
      text.remove_prefix(blanks);
      if (text.empty()) return;
      if (text.front() == '\n') {
        CloseDocument();
        ++source_offset_;
        text.remove_prefix(1);
        continue;
      }
      line_is_blank_ = false;
    }
    // Up to the end of the last line that is followed by something other than white space.
    std::size_t end = 0;
    while (true) {
      const void* newline = std::memchr(text.data() + end, '\n', text.size() - end);
      if (newline == nullptr) {
        end = text.size();
        break;
      }
      end = static_cast<std::size_t>(static_cast<const char*>(newline) - text.data()) + 1;
      if (end == text.size() || IsSpace(text[end])) {
        line_is_blank_ = true;
        break;
      }
    }
    Append(text.substr(0, end));
    text.remove_prefix(end);
  }
}

void CorpusBuilder::AddDocuments(std::string_view text, const std::uint64_t* ends,
                                 std::size_t count) {
  std::uint64_t begin = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (ends[i] < begin || ends[i] > text.size()) {
      throw std::invalid_argument("the ends of the documents must ascend within the text");
    }
    AddDocument(text.substr(begin, ends[i] - begin));
    begin = ends[i];
  }
}

void CorpusBuilder::AddDocument(std::string_view text) {
  CloseDocument();
  totals_.bytes += text.size();
  OpenDocument();
  Append(text);
  CloseDocument();
  line_is_blank_ = true;
}

void CorpusBuilder::OpenDocument() {
  const std::uint64_t number = totals_.documents++;
  const bool heldout = destination_ == Destination::kHeldOut ||
                       (destination_ == Destination::kByDraw && held_out_(number));
  const std::size_t at = open_->text.size();
  open_->segments.push_back({at, at, source_offset_, source_, heldout, false, false});
  document_is_open_ = true;
}

void CorpusBuilder::Append(std::string_view text) {
  while (!text.empty()) {
    if (!document_is_open_) OpenDocument();
    const std::string_view part = text.substr(0, kAppendBytes);
    text.remove_prefix(part.size());
    const std::size_t after_space = AfterLastSpace(part, part.size());
    if (after_space > 0) safe_cut_ = open_->text.size() + after_space;
    open_->text.append(part);
    open_->segments.back().end = open_->text.size();
    source_offset_ += part.size();
    if (open_->text.size() >= options_.block_bytes && safe_cut_ > 0) CutBlock();
  }
}

void CorpusBuilder::CloseDocument() {
  if (!document_is_open_) return;
  open_->segments.back().ends = true;
  document_is_open_ = false;
  safe_cut_ = open_->text.size();
  if (open_->text.size() >= options_.block_bytes) CutBlock();
}

void CorpusBuilder::CutBlock() {
  auto next = std::make_unique<Block>();
  next->number = open_->number + 1;
  next->text.reserve(options_.block_bytes + kAppendBytes);
  if (document_is_open_) {
    // The cut lies in the open document, or before its first byte.
    Segment& last = open_->segments.back();
    Segment rest = last;
    rest.begin = 0;
    rest.end = last.end - safe_cut_;
    next->text.append(open_->text, safe_cut_, std::string::npos);
    open_->text.resize(safe_cut_);
    if (safe_cut_ > last.begin) {
      rest.source_offset += safe_cut_ - last.begin;
      rest.continues = true;
      last.end = safe_cut_;
    } else {
      open_->segments.pop_back();
    }
    next->segments.push_back(rest);
  }
  safe_cut_ = 0;
  std::unique_ptr<Block> full = std::exchange(open_, std::move(next));
  ++submitted_;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return queue_.size() < 2 * threads_.size(); });
    queue_.push_back(std::move(full));
  }
  work_.notify_one();
}

void CorpusBuilder::Flush() {
  CloseDocument();
  if (!open_->segments.empty()) CutBlock();
  Wait();
}

void CorpusBuilder::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return taken_ + results_.size() == submitted_; });
}

bool CorpusBuilder::Pause(PausePoint* point) {
  *point = {source_offset_, totals_.documents, totals_.bytes};
  if (document_is_open_) {
    const Segment& open = open_->segments.back();
    if (open.continues) return false;
    point->offset = open.source_offset;
    point->documents -= 1;
    point->bytes -= source_offset_ - open.source_offset;
    safe_cut_ = open.begin;
    if (safe_cut_ > 0) CutBlock();
  } else if (!open_->segments.empty()) {
    CutBlock();
  }
  Wait();
  return true;
}

void CorpusBuilder::Restore(std::string_view words, const std::uint32_t* train,
                            std::size_t train_size, const CorpusTotals& totals) {
  while (!words.empty()) {
    const std::size_t size = words.find('\n');
    if (size == 0 || size == std::string_view::npos) {
      throw std::invalid_argument("every word must have bytes and a line break after it");
    }
    const std::size_t old_size = lexicon_.size();
    lexicon_.Intern(words.substr(0, size), HashWord(words.substr(0, size)));
    if (lexicon_.size() == old_size) throw std::invalid_argument("a word occurs twice");
    words.remove_prefix(size + 1);
  }
  lexicon_.CountStream(train, train_size);
  totals_ = totals;
}

Streams CorpusBuilder::Take() {
  Streams streams;
  while (true) {
    std::unique_ptr<Result> result;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto next = results_.find(taken_);
      if (next == results_.end()) return streams;
      result = std::move(next->second);
      results_.erase(next);
    }
    ++taken_;
    if (result->error) std::rethrow_exception(result->error);
    if (result->bare_end && taken_words_) {
      (result->bare_end_heldout ? streams.heldout : streams.train).push_back({kDocumentMark});
      ++(result->bare_end_heldout ? totals_.heldout_documents : totals_.train_documents);
      if (!result->bare_end_heldout) {
        const std::lock_guard<std::mutex> lock(lexicon_mutex_);
        lexicon_.Count(kDocumentMark, 1);
      }
    }
    taken_words_ =
        result->open && (result->open_has_words || (result->open_continues && taken_words_));
    totals_.train_documents += result->train_documents;
    totals_.heldout_documents += result->heldout_documents;
    totals_.train_words += result->train.size() - result->train_documents;
    totals_.heldout_words += result->heldout.size() - result->heldout_documents;
    totals_.replaced += result->replaced;
    if (!result->train.empty()) streams.train.push_back(std::move(result->train));
    if (!result->heldout.empty()) streams.heldout.push_back(std::move(result->heldout));
  }
}

}  // namespace mvbert
