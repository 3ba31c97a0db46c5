#include "tokenizer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "philox.h"
#include "philox_blocks.h"
#include "piece_cache.h"
#include "share.h"

namespace mvbert {

// ---- one thread's work ----------------------------------------------------------------------

class Tokenizer::Worker {
 public:
  explicit Worker(const Tokenizer& tokenizer)
      : tokenizer_(tokenizer), cache_(std::make_unique<PieceCache>(*tokenizer.seeds_)) {}

  // Words of several texts are looked up together, so short texts cost what long ones do.
  void Encode(const std::string_view* texts, std::size_t count, const TextOptions& options,
              std::uint64_t first_number, IdBuffer* ids, std::vector<std::uint64_t>* ends,
              WordMap* words, IdBuffer* spans = nullptr) {
    spans_ = spans;
    batch_.TrackSources(spans != nullptr);
    mixed_ = options.coin.threshold != 0;
    threshold_ = options.coin.threshold;
    if (key_seed_ != options.coin.seed) group_ = kNoGroup;
    key_seed_ = options.coin.seed;
    for (std::size_t i = 0; i < count; ++i) {
      number_ = first_number + i;
      word_ = 0;
      batch_.RestartSources(0);
      tokenizer_.SplitAtSpecial(texts[i], options.find_special,
                                [&](std::string_view part, std::int32_t id) {
                                  if (id < 0) return Read(part, options.limit, ids, ends, words);
                                  Look(ids, ends, words);
                                  AddSpecial(part, id, ids, words);
                                  return word_ < options.limit;
                                });
      text_ends_.push_back(static_cast<std::uint32_t>(batch_.size()));
      if (batch_.full()) Look(ids, ends, words);
    }
    Look(ids, ends, words);
  }

 private:
  static constexpr std::uint64_t kNoGroup = ~std::uint64_t{0};

  // Takes the words of a part of a text; false when the text has enough.
  bool Read(std::string_view text, std::uint64_t limit, IdBuffer* ids,
            std::vector<std::uint64_t>* ends, WordMap* words) {
    // A word has an id at least. English has five or six bytes a word.
    const std::size_t most =
        limit > WordBatch::kTarget ? WordBatch::kTarget : static_cast<std::size_t>(8 * limit + 64);
    std::size_t at = 0;
    do {
      const std::size_t before = batch_.size();
      at = tokenizer_.splitter_.Fill(text, at, &batch_, most);
      Draw(batch_.size() - before);
      if (word_ >= limit) {
        batch_.DropOpen();
        return false;
      }
      if (batch_.full()) Look(ids, ends, words);
    } while (at < text.size());
    return true;
  }

  // Looks up all words that are waiting; the batch is not full afterwards.
  void Look(IdBuffer* ids, std::vector<std::uint64_t>* ends, WordMap* words) {
    if (batch_.size() > 0 || !text_ends_.empty()) {
      const std::uint8_t* const choices = mixed_ ? choices_.data() : nullptr;
      std::uint32_t* starts = nullptr;
      if (words != nullptr) {
        const std::size_t before = words->starts.size(), after = before + batch_.size();
        words->starts.resize(after);
        words->from_student.resize(after, 0);
        if (mixed_) std::copy_n(choices, batch_.size(), words->from_student.begin() + before);
        starts = words->starts.data() + before;
      }
      const std::size_t before = ids->size();
      cache_->Look(batch_, choices, text_ends_, ids, ends, starts);
      if (spans_ != nullptr) AddSpans(before, *ids);
      if (cache_->overfull()) cache_ = std::make_unique<PieceCache>(*tokenizer_.seeds_);
    }
    batch_.Clear();
    text_ends_.clear();
    choices_.clear();
  }

  // (The coin is not asked, but a special piece is a word of the text.)
  void AddSpecial(std::string_view piece, std::int32_t id, IdBuffer* ids, WordMap* words) {
    ++word_;
    if (spans_ != nullptr) {
      std::uint32_t end = batch_.source_at();
      for (const char c : piece) end += (c & 0xC0) != 0x80;
      const std::int32_t span[] = {static_cast<std::int32_t>(batch_.source_at()),
                                   static_cast<std::int32_t>(end)};
      spans_->Append(span, 2);
      batch_.RestartSources(end);
    }
    if (words != nullptr) {
      words->starts.push_back(static_cast<std::uint32_t>(ids->size()));
      words->from_student.push_back(false);
    }
    ids->Append(&id, 1);
  }

  // Where the pieces of the batch's words lie; `ids` ends with them, the first is ids[begin]. A
  // piece begins where its word does or the piece before ended, and [UNK] is all of its word: no
  // branch on how many pieces a word has.
  void AddSpans(std::size_t begin, const IdBuffer& ids) {
    spans_->Reserve(2 * ids.size() - spans_->size());
    std::int32_t* out = spans_->end();
    // (Locals: a store to *out might change a member.)
    const std::uint32_t *const starts = batch_.starts(), *const ends = batch_.ends();
    const std::uint32_t* const letters = tokenizer_.letters_.data();
    const std::uint8_t* const begins_word = tokenizer_.begins_word_.data();
    const std::int32_t unk = tokenizer_.teacher_->unk_id();
    const std::int32_t* const last = ids.end();
    batch_.WithSources([&](auto sources) {
      std::size_t word = 0;  // the next
      std::uint32_t from = 0, to = 0;
      for (const std::int32_t* id = ids.data() + begin; id < last; ++id, out += 2) {
        const auto piece = static_cast<std::size_t>(*id);
        const std::uint32_t start = starts[word];
        const bool begins = begins_word[piece] != 0;
        word += begins;
        from = begins ? start : to;
        to = from + letters[piece];
        if (__builtin_expect(*id == unk, 0)) {
          // (A piece that is followed by the rest of its word was found as written.)
          if (id + 1 == last || begins_word[static_cast<std::size_t>(id[1])]) to = ends[word - 1];
        }
        const std::uint32_t span[] = {sources.begin(from, to), sources.end(from, to)};
        std::memcpy(out, span, sizeof span);
      }
    });
    spans_->SetEnd(out);
  }

  // The coin's results for the next words of the text.
  void Draw(std::size_t count) {
    if (!mixed_) {
      word_ += count;
      return;
    }
    const PhiloxBlocksFunction blocks = PhiloxBlocks();
    std::size_t done = choices_.size();
    choices_.resize(done + count);
    for (const std::size_t end = choices_.size(); done < end;) {
      const std::uint64_t group = word_ / 64;
      if (group != group_ || number_ != group_number_) {
        std::uint32_t first[16];
        for (std::uint32_t i = 0; i < 16; ++i)
          first[i] = static_cast<std::uint32_t>(16 * group) + i;
        blocks(first,
               {static_cast<std::uint32_t>(Purpose::kText), static_cast<std::uint32_t>(number_),
                static_cast<std::uint32_t>(number_ >> 32)},
               PhiloxKey(key_seed_), drawn_);
        group_ = group;
        group_number_ = number_;
      }
      const std::size_t from = word_ % 64;
      const std::size_t n = std::min<std::size_t>(64 - from, end - done);
      std::uint8_t* const choices = choices_.data() + done;
      if (threshold_ >> 32 != 0) {
        std::memset(choices, 1, n);
      } else {
        const auto threshold = static_cast<std::uint32_t>(threshold_);  // (local: so it vectorises)
        for (std::size_t i = 0; i < n; ++i) choices[i] = drawn_[from + i] < threshold;
      }
      done += n;
      word_ += n;
    }
  }

  const Tokenizer& tokenizer_;
  std::unique_ptr<PieceCache> cache_;
  WordBatch batch_;
  std::vector<std::uint32_t> text_ends_;  // texts that end within the batch, in its words
  std::vector<std::uint8_t> choices_;     // of the batch's words, if there is a coin
  IdBuffer* spans_ = nullptr;             // where spans go, if they are asked for
  bool mixed_ = false;
  std::uint64_t threshold_ = 0;
  std::uint64_t number_ = 0;  // of the text being read
  std::uint64_t word_ = 0;    // words of it so far
  std::uint32_t drawn_[64];   // the coin's numbers for words [64 * group_, 64 * (group_ + 1))
  std::uint64_t group_ = kNoGroup, group_number_ = 0, key_seed_ = 0;
};

// A worker for the length of a call. There is no lock: a worker is in exactly one place, the array
// or a lease.
class Tokenizer::Lease {
 public:
  explicit Lease(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
    for (auto& place : tokenizer.idle_) {
      if (place.load(std::memory_order_relaxed) == nullptr) continue;
      worker_ = place.exchange(nullptr, std::memory_order_acquire);
      if (worker_ != nullptr) return;
    }
    worker_ = new Worker(tokenizer);
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() {
    // After an error the batch may hold half a word: such a worker is not used again.
    if (!finished_) {
      delete worker_;
      return;
    }
    for (auto& place : tokenizer_.idle_) {
      Worker* expected = nullptr;
      if (place.compare_exchange_strong(expected, worker_, std::memory_order_release)) return;
    }
    delete worker_;
  }

  Worker* operator->() const { return worker_; }
  void Finish() { finished_ = true; }

 private:
  const Tokenizer& tokenizer_;
  Worker* worker_ = nullptr;
  bool finished_ = false;
};

// ---- the tokenizer --------------------------------------------------------------------------

Tokenizer::Tokenizer(SplitOptions options, std::shared_ptr<const WordPiece> teacher,
                     std::shared_ptr<const WordPiece> student,
                     const std::vector<SpecialPiece>& special)
    : splitter_(options),
      teacher_(std::move(teacher)),
      student_(std::move(student)),
      special_(special, splitter_, teacher_ == nullptr ? 0 : teacher_->size()) {
  if (teacher_ == nullptr) throw std::invalid_argument("a tokenizer needs a vocabulary");
  if (student_ != nullptr &&
      teacher_->size() + student_->size() >
          static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("the two vocabularies have more than 2^31 - 1 pieces together");
  }
  seeds_ = std::make_unique<const PieceCache>(*teacher_, student_.get());
  for (std::size_t id = 0; id < teacher_->size(); ++id) {
    const std::string& piece = teacher_->piece(static_cast<std::int32_t>(id));
    const bool begins = piece.compare(0, 2, "##") != 0;
    begins_word_.push_back(begins);
    letters_.push_back(static_cast<std::uint32_t>(piece.size() - (begins ? 0 : 2)));
  }
}

Tokenizer::~Tokenizer() {
  ForgetWords();
  for (auto& place : buffers_) std::free(place.exchange(nullptr));
}

void Tokenizer::ForgetWords() const {
  for (auto& place : idle_) delete place.exchange(nullptr);
}

template <typename Found>
void Tokenizer::SplitAtSpecial(std::string_view text, bool find_special, Found&& found) const {
  if (find_special) {
    special_.Split(text, found);
  } else if (!text.empty()) {
    found(text, -1);
  }
}

void Tokenizer::CheckCoin(const Coin& coin) const {
  if (coin.threshold > std::uint64_t{1} << 32) {
    throw std::invalid_argument("the coin's threshold must lie in [0, 2^32]");
  }
  if (coin.threshold != 0 && student_ == nullptr) {
    throw std::invalid_argument("student_prob needs a second vocabulary");
  }
}

void Tokenizer::EncodeParts(const std::vector<std::string_view>& texts, const TextOptions& options,
                            std::uint64_t first_number, int threads, std::vector<Encoding>* out,
                            const std::vector<std::uint64_t>* rows) const {
  CheckCoin(options.coin);
  // Parts of about 256 KiB: threads stay busy to the end, and their memory is used again.
  constexpr std::size_t kPart = std::size_t{1} << 18;
  std::vector<std::size_t> begins = {0};
  std::size_t bytes = 0;
  std::size_t row = 0;
  for (std::size_t i = 0; i + 1 < texts.size(); ++i) {
    bytes += texts[i].size();
    if (bytes >= kPart) {
      if (rows != nullptr) {
        while (row < rows->size() && (*rows)[row] < i + 1) ++row;
        if (row < rows->size() && (*rows)[row] != i + 1) continue;
      }
      begins.push_back(i + 1);
      bytes = 0;
    }
  }
  begins.push_back(texts.size());
  std::vector<Encoding>& parts = *out;
  parts.resize(begins.size() - 1);
  Share(parts.size(), threads, [&](auto&& next) {
    Lease worker(*this);
    for (std::size_t p; next(&p);) {
      parts[p].ends.reserve(begins[p + 1] - begins[p]);
      parts[p].ids = TakeBuffer();
      if (options.spans) parts[p].spans = TakeBuffer();
      worker->Encode(texts.data() + begins[p], begins[p + 1] - begins[p], options,
                     first_number + begins[p], &parts[p].ids, &parts[p].ends, nullptr,
                     options.spans ? &parts[p].spans : nullptr);
    }
    worker.Finish();
  });
}

void Tokenizer::Encode(const std::vector<std::string_view>& texts, const TextOptions& options,
                       std::uint64_t first_number, int threads, Encoding* out) const {
  if (threads == 1) {
    CheckCoin(options.coin);
    Lease worker(*this);
    worker->Encode(texts.data(), texts.size(), options, first_number, &out->ids, &out->ends,
                   nullptr);
    worker.Finish();
    return;
  }
  std::vector<Encoding> parts;
  EncodeParts(texts, options, first_number, threads, &parts);
  std::vector<std::size_t> bases = {out->ids.size()};
  for (const Encoding& part : parts) bases.push_back(bases.back() + part.ids.size());
  out->ids.Reserve(bases.back() - bases.front());
  std::int32_t* ids = out->ids.data();
  Share(parts.size(), threads, [&](auto&& next) {
    for (std::size_t p; next(&p);) {
      if (parts[p].ids.size() == 0) continue;
      std::memcpy(ids + bases[p], parts[p].ids.data(), parts[p].ids.size() * sizeof(std::int32_t));
    }
  });
  out->ids.SetEnd(ids + bases.back());
  for (std::size_t p = 0; p < parts.size(); ++p) {
    for (const std::uint64_t end : parts[p].ends) out->ends.push_back(bases[p] + end);
  }
  Recycle(&parts);
}

IdBuffer Tokenizer::TakeBuffer() const {
  std::int32_t* kept = nullptr;
  for (auto& place : buffers_) {
    if (place.load(std::memory_order_relaxed) == nullptr) continue;
    kept = place.exchange(nullptr, std::memory_order_acquire);
    if (kept != nullptr) break;
  }
  return IdBuffer(kept, kPartIds);
}

void Tokenizer::Recycle(std::vector<Encoding>* parts) const {
  auto place = buffers_.begin();
  for (Encoding& part : *parts) {
    for (IdBuffer* const buffer : {&part.ids, &part.spans}) {
      if (buffer->capacity() != kPartIds) continue;  // it has grown, or is none
      std::int32_t* expected = nullptr;
      while (place != buffers_.end() &&
             !place->compare_exchange_strong(expected, buffer->data(), std::memory_order_release)) {
        expected = nullptr;
        ++place;
      }
      if (place == buffers_.end()) break;
      buffer->Release();
    }
  }
  parts->clear();
}

void Tokenizer::Shrink(std::vector<Encoding>* parts) const {
  std::vector<Encoding> roomy;
  for (Encoding& part : *parts) {
    for (IdBuffer* const buffer : {&part.ids, &part.spans}) {
      if (buffer->size() >= buffer->capacity() / 2) continue;
      IdBuffer exact(nullptr, std::max<std::size_t>(buffer->size(), 1));
      exact.Append(buffer->data(), buffer->size());
      std::swap(*buffer, exact);
      roomy.emplace_back().ids = std::move(exact);
    }
  }
  Recycle(&roomy);
}

void Tokenizer::EncodeWords(std::string_view text, const TextOptions& options, std::uint64_t number,
                            IdBuffer* ids, WordMap* words) const {
  CheckCoin(options.coin);
  std::vector<std::uint64_t> ends;
  Lease worker(*this);
  worker->Encode(&text, 1, options, number, ids, &ends, words);
  worker.Finish();
}

void Tokenizer::EncodeLong(std::string_view text, bool find_special, int threads,
                           IdBuffer* ids) const {
  constexpr std::size_t kPart = std::size_t{1} << 20;
  std::vector<std::string_view> parts;
  while (text.size() > kPart) {
    const std::size_t end = text.find_first_of(" \n", kPart);
    if (end == std::string_view::npos) break;
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  parts.push_back(text);
  TextOptions options;
  options.find_special = find_special;
  Encoding encoding;
  Encode(parts, options, 0, threads, &encoding);
  if (ids->size() == 0) {
    *ids = std::move(encoding.ids);
  } else {
    ids->Append(encoding.ids.data(), encoding.ids.size());
  }
}

void Tokenizer::EncodeSpans(std::string_view text, bool find_special, IdBuffer* ids,
                            IdBuffer* spans) const {
  TextOptions options;
  options.find_special = find_special;
  std::vector<std::uint64_t> ends;
  Lease worker(*this);
  worker->Encode(&text, 1, options, 0, ids, &ends, nullptr, spans);
  worker.Finish();
}

}  // namespace mvbert
