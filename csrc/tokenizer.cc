#include "tokenizer.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "lexicon.h"
#include "philox.h"
#include "philox_blocks.h"

namespace mvbert {
namespace {

// The pieces of a word in one number: up to two ids beside each other, or a place in a pool.
//   bits 62-63: how many ids, or kInPool; bits 31-61 and 0-30: ids, or length and offset in the pool.
using Pieces = std::uint64_t;
constexpr std::uint64_t kInPool = 3;
constexpr std::uint64_t kLow31 = 0x7FFFFFFF;

Pieces PackPieces(std::uint64_t count, std::uint64_t high, std::uint64_t low) {
  return count << 62 | high << 31 | low;
}

constexpr std::size_t kPoolLimit = std::size_t{1} << 22;  // ids; more means the cache starts again

// Memory whose every byte is zero, in huge pages where the system has them.
template <typename T>
class ZeroedTable {
 public:
  explicit ZeroedTable(std::size_t size) : size_(size) {
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    data_ = static_cast<T*>(std::aligned_alloc(kHugePage, size * sizeof(T)));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data_, size * sizeof(T), MADV_HUGEPAGE);  // before the first touch; a hint only
#endif
    std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  ZeroedTable(const ZeroedTable&) = delete;
  ZeroedTable& operator=(const ZeroedTable&) = delete;
  ~ZeroedTable() { std::free(data_); }

  T& operator[](std::size_t i) { return data_[i]; }
  void CopyFrom(const ZeroedTable& other) {
    std::memcpy(static_cast<void*>(data_), other.data_, size_ * sizeof(T));
  }
  void Clear() { std::memset(static_cast<void*>(data_), 0, size_ * sizeof(T)); }

 private:
  std::size_t size_;
  T* data_;
};

}  // namespace

// ---- the cache ------------------------------------------------------------------------------

// Words and their pieces under both vocabularies; what is not in is cut on the way. Not thread-safe.
class Tokenizer::Cache {
 public:
  Cache(const WordPiece& teacher, const WordPiece* student)
      : teacher_(teacher), student_(student), buckets_(kBuckets) {
    // The vocabularies' own words first: most of any text.
    for (const WordPiece* vocabulary : {&teacher, student}) {
      if (vocabulary == nullptr) continue;
      for (std::size_t id = 0; id < vocabulary->size(); ++id) {
        const std::string& word = vocabulary->piece(static_cast<std::int32_t>(id));
        if (word.empty() || word.size() > 16 || word.compare(0, 2, "##") == 0) continue;
        char padded[16 + WordBatch::kPadding] = {};
        std::memcpy(padded, word.data(), word.size());
        std::uint64_t low, high;
        ShortWord(padded, word.size(), &low, &high);
        Bucket& bucket = buckets_[BucketOf(low, high, word.size())];
        if (bucket.slots[1].low == 0 && Find(bucket, low, high) == nullptr) {
          Insert(&bucket, low, high, {padded, word.size()});
        }
      }
    }
  }

  // A copy that can grow by itself.
  explicit Cache(const Cache& seeds)
      : teacher_(seeds.teacher_), student_(seeds.student_), pool_(seeds.pool_), buckets_(kBuckets) {
    buckets_.CopyFrom(seeds.buckets_);
  }

  // Appends the pieces of a batch's words to *ids; choices[i] is 1 where the student cuts word i.
  // With `words`, tells where each begins.
  void Look(const WordBatch& batch, const std::uint8_t* choices, IdBuffer* ids, WordMap* words) {
    if (choices == nullptr) {
      LookUp<false>(batch, choices, ids, words);
    } else {
      LookUp<true>(batch, choices, ids, words);
    }
  }

  bool overfull() const { return pool_.size() > kPoolLimit; }

 private:
  static constexpr int kBits = 16;
  static constexpr std::size_t kBuckets = std::size_t{1} << kBits;
  static constexpr std::size_t kLongest = 48;  // bytes of a word that is remembered

  struct Slot {
    std::uint64_t low, high;  // the word, padded with zeros
    Pieces pieces[2];         // the teacher's, the student's
  };
  struct alignas(64) Bucket {
    Slot slots[2];
  };
  struct alignas(64) LongSlot {
    char word[kLongest];
    Pieces pieces[2];
  };

  static std::size_t BucketOf(std::uint64_t low, std::uint64_t high, std::size_t size) {
    return HashShortWord(low, high, size) >> (64 - kBits);
  }

  static const Slot* Find(const Bucket& bucket, std::uint64_t low, std::uint64_t high) {
    for (const Slot& slot : bucket.slots) {
      if (slot.low == low && slot.high == high) return &slot;
    }
    return nullptr;
  }

  template <bool kMixed>
  void LookUp(const WordBatch& batch, const std::uint8_t* choices, IdBuffer* ids, WordMap* words) {
    // Two passes over 64 words at a time: the first finds their places and asks for the memory, so
    // that the second need not wait for it.
    constexpr std::size_t kGroup = 64;
    std::uint64_t lows[kGroup], highs[kGroup];
    std::uint32_t places[kGroup];
    const std::size_t count = batch.size();
    for (std::size_t first = 0; first < count; first += kGroup) {
      const std::size_t n = std::min(kGroup, count - first);
      for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t start = batch.start(first + i);
        const std::uint32_t size = batch.end(first + i) - start;
        ShortWord(batch.bytes() + start, std::min<std::uint32_t>(size, 16), &lows[i], &highs[i]);
        const std::size_t place = BucketOf(lows[i], highs[i], size);
        __builtin_prefetch(&buckets_[place]);
        places[i] = size <= 16 ? static_cast<std::uint32_t>(place) : kNoPlace;
      }
      ids->Reserve(2 * n + 2);
      std::int32_t* out = ids->end();
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t which = kMixed ? choices[first + i] : 0;
        if (words != nullptr) {
          words->starts.push_back(static_cast<std::uint32_t>(out - ids->data()));
          words->from_student.push_back(static_cast<std::uint8_t>(which));
        }
        Pieces pieces;
        if (places[i] != kNoPlace) {
          Bucket& bucket = buckets_[places[i]];
          const bool at0 = (bucket.slots[0].low == lows[i]) & (bucket.slots[0].high == highs[i]);
          const bool at1 = (bucket.slots[1].low == lows[i]) & (bucket.slots[1].high == highs[i]);
          if (__builtin_expect(at0 | at1, 1)) {
            pieces = bucket.slots[at0 ? 0 : 1].pieces[which];
          } else {
            pieces = Insert(&bucket, lows[i], highs[i], batch[first + i])->pieces[which];
          }
        } else {
          pieces = LongWord(batch[first + i], which);
        }
        const std::uint64_t number = pieces >> 62;
        if (__builtin_expect(number != kInPool, 1)) {
          out[0] = static_cast<std::int32_t>(pieces & kLow31);
          out[1] = static_cast<std::int32_t>(pieces >> 31 & kLow31);
          out += number;
        } else {
          const std::size_t length = pieces >> 31 & kLow31;
          ids->SetEnd(out);
          ids->Reserve(length + 2 * n + 2);
          out = ids->end();
          std::memcpy(out, pool_.data() + (pieces & kLow31), length * sizeof(std::int32_t));
          out += length;
        }
      }
      ids->SetEnd(out);
    }
  }

  Pieces Cut(const WordPiece& vocabulary, std::string_view word, std::int32_t base) {
    cut_.clear();
    vocabulary.Cut(word, &cut_);
    for (std::int32_t& id : cut_) id += base;
    if (cut_.size() == 1) return PackPieces(1, 0, static_cast<std::uint64_t>(cut_[0]));
    if (cut_.size() == 2) {
      return PackPieces(2, static_cast<std::uint64_t>(cut_[1]), static_cast<std::uint64_t>(cut_[0]));
    }
    const std::size_t offset = pool_.size();
    pool_.insert(pool_.end(), cut_.begin(), cut_.end());
    return PackPieces(kInPool, cut_.size(), offset);
  }

  void CutBoth(std::string_view word, Pieces pieces[2]) {
    pieces[0] = Cut(teacher_, word, 0);
    pieces[1] = student_ == nullptr
                    ? 0
                    : Cut(*student_, word, static_cast<std::int32_t>(teacher_.size()));
  }

  // Puts a word into the free slot, or else into the second, and gives the slot.
  Slot* Insert(Bucket* bucket, std::uint64_t low, std::uint64_t high, std::string_view word) {
    Slot* slot = bucket->slots[0].low == 0 ? &bucket->slots[0] : &bucket->slots[1];
    slot->low = low;
    slot->high = high;
    CutBoth(word, slot->pieces);
    return slot;
  }

  // A word of more than 16 bytes. (Scripts with two or three bytes a letter have many.)
  Pieces LongWord(std::string_view word, std::size_t which) {
    if (word.size() > kLongest) {
      // The pool as a scratch space: what a long word leaves there is bounded by overfull().
      const bool student = which != 0;
      return Cut(student ? *student_ : teacher_, word,
                 student ? static_cast<std::int32_t>(teacher_.size()) : 0);
    }
    if (long_ == nullptr) long_ = std::make_unique<ZeroedTable<LongSlot>>(kBuckets);
    char key[kLongest] = {};
    std::memcpy(key, word.data(), word.size());
    LongSlot& slot = (*long_)[HashWord(word) >> (64 - kBits)];
    if (std::memcmp(slot.word, key, kLongest) != 0) {
      CutBoth(word, slot.pieces);
      std::memcpy(slot.word, key, kLongest);
    }
    return slot.pieces[which];
  }

  static constexpr std::uint32_t kNoPlace = 0xFFFFFFFF;

  const WordPiece& teacher_;
  const WordPiece* student_;
  std::vector<std::int32_t> cut_;
  std::vector<std::int32_t> pool_;
  mutable ZeroedTable<Bucket> buckets_;
  std::unique_ptr<ZeroedTable<LongSlot>> long_;
};

// ---- one thread's work ----------------------------------------------------------------------

class Tokenizer::Worker {
 public:
  explicit Worker(const Tokenizer& tokenizer)
      : tokenizer_(tokenizer), cache_(std::make_unique<Cache>(*tokenizer.seeds_)) {}

  void Encode(std::string_view text, bool find_special, const Coin& coin, std::uint64_t number,
              IdBuffer* ids, WordMap* words) {
    coin_ = coin;
    number_ = number;
    word_ = 0;
    tokenizer_.SplitAtSpecial(text, find_special, [&](std::string_view part, std::int32_t id) {
      if (id < 0) {
        EncodePart(part, ids, words);
        return;
      }
      const std::uint8_t student = Choices(1)[0];
      if (words != nullptr) {
        words->starts.push_back(static_cast<std::uint32_t>(ids->size()));
        words->from_student.push_back(student);
      }
      ids->Append(&id, 1);
      if (student) ids->end()[-1] = StudentSpecial(id);
    });
  }

 private:
  void EncodePart(std::string_view text, IdBuffer* ids, WordMap* words) {
    std::size_t at = 0;
    do {
      at = tokenizer_.splitter_.Fill(text, at, &batch_);
      if (batch_.size() > 0) {
        const bool mixed = coin_.threshold != 0;
        cache_->Look(batch_, mixed ? Choices(batch_.size()) : nullptr, ids, words);
        if (cache_->overfull()) cache_ = std::make_unique<Cache>(*tokenizer_.seeds_);
      }
      batch_.Clear();
    } while (at < text.size());
  }

  // The coin's results for the next words of the text.
  const std::uint8_t* Choices(std::size_t count) {
    choices_.resize(count + 64);
    if (coin_.threshold == 0) {
      choices_[0] = 0;
      word_ += count;
      return choices_.data();
    }
    const PhiloxBlocksFunction blocks = PhiloxBlocks();
    const std::array<std::uint32_t, 3> rest = {static_cast<std::uint32_t>(Purpose::kText),
                                               static_cast<std::uint32_t>(number_),
                                               static_cast<std::uint32_t>(number_ >> 32)};
    const std::array<std::uint32_t, 2> key = PhiloxKey(coin_.seed);
    for (std::size_t done = 0; done < count;) {
      const std::uint64_t group = word_ / 64;
      if (group != group_ || number_ != group_number_ || coin_.seed != group_seed_) {
        std::uint32_t first[16];
        for (std::uint32_t i = 0; i < 16; ++i) first[i] = static_cast<std::uint32_t>(16 * group) + i;
        blocks(first, rest, key, drawn_);
        group_ = group;
        group_number_ = number_;
        group_seed_ = coin_.seed;
      }
      const std::size_t from = word_ % 64;
      const std::size_t n = std::min<std::size_t>(64 - from, count - done);
      const std::uint64_t threshold = coin_.threshold;
      for (std::size_t i = 0; i < n; ++i) choices_[done + i] = drawn_[from + i] < threshold;
      done += n;
      word_ += n;
    }
    return choices_.data();
  }

  std::int32_t StudentSpecial(std::int32_t id) const {
    for (const auto& [piece, special_id] : tokenizer_.special_) {
      if (special_id != id) continue;
      std::vector<std::int32_t> cut;
      tokenizer_.student_->Cut(piece, &cut);
      return cut[0] + static_cast<std::int32_t>(tokenizer_.teacher_->size());
    }
    return id;
  }

  const Tokenizer& tokenizer_;
  std::unique_ptr<Cache> cache_;
  WordBatch batch_;
  Coin coin_;
  std::uint64_t number_ = 0;
  std::uint64_t word_ = 0;
  std::vector<std::uint8_t> choices_;
  std::uint32_t drawn_[64];
  std::uint64_t group_ = ~std::uint64_t{0}, group_number_ = 0, group_seed_ = 0;
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
                     std::vector<std::pair<std::string, std::int32_t>> special)
    : splitter_(options),
      teacher_(std::move(teacher)),
      student_(std::move(student)),
      special_(std::move(special)) {
  if (teacher_ == nullptr) throw std::invalid_argument("a tokenizer needs a vocabulary");
  if (student_ != nullptr &&
      teacher_->size() + student_->size() >
          static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("the two vocabularies have more than 2^31 - 1 pieces together");
  }
  for (const auto& [piece, id] : special_) {
    if (piece.empty() || piece.find_first_of(" \t\r\n") != std::string::npos) {
      throw std::invalid_argument("a special piece must have letters and no space, got '" + piece +
                                  "'");
    }
    if (id < 0 || static_cast<std::size_t>(id) >= teacher_->size()) {
      throw std::invalid_argument("special piece '" + piece + "' has id " + std::to_string(id) +
                                  ", outside the vocabulary");
    }
    if (special_bytes_.find(piece[0]) == std::string::npos) special_bytes_ += piece[0];
  }
  seeds_ = std::make_unique<const Cache>(*teacher_, student_.get());
}

Tokenizer::~Tokenizer() { ForgetWords(); }

void Tokenizer::ForgetWords() const {
  for (auto& place : idle_) delete place.exchange(nullptr);
}

template <typename Found>
void Tokenizer::SplitAtSpecial(std::string_view text, bool find_special, Found&& found) const {
  if (!find_special || special_.empty()) {
    if (!text.empty()) found(text, -1);
    return;
  }
  std::size_t begin = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    // Leftmost first, then longest, as Hugging Face's trie finds them.
    at = special_bytes_.size() == 1 ? text.find(special_bytes_[0], at)  // at memory speed
                                    : text.find_first_of(special_bytes_, at);
    if (at == std::string_view::npos) break;
    std::size_t length = 0;
    std::int32_t id = -1;
    for (const auto& [piece, special_id] : special_) {
      if (piece.size() > length && text.compare(at, piece.size(), piece) == 0) {
        length = piece.size();
        id = special_id;
      }
    }
    if (length == 0) {
      ++at;
      continue;
    }
    if (at > begin) found(text.substr(begin, at - begin), -1);
    found(std::string_view(), id);
    begin = at += length;
  }
  if (begin < text.size()) found(text.substr(begin), -1);
}

void Tokenizer::Encode(const std::vector<std::string_view>& texts, bool find_special,
                       const Coin& coin, std::uint64_t first_number, int threads,
                       Encoding* out) const {
  if (coin.threshold != 0 && student_ == nullptr) {
    throw std::invalid_argument("student_prob needs a second vocabulary");
  }
  // Parts of about 256 KiB, so that threads stay busy to the end; less is not worth a thread.
  constexpr std::size_t kPart = std::size_t{1} << 18;
  std::vector<std::size_t> part_ends;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    bytes += texts[i].size();
    if (bytes >= kPart || i + 1 == texts.size()) {
      part_ends.push_back(i + 1);
      bytes = 0;
    }
  }
  const auto encode = [&](std::size_t begin, std::size_t end, Worker* worker, Encoding* result) {
    for (std::size_t i = begin; i < end; ++i) {
      worker->Encode(texts[i], find_special, coin, first_number + i, &result->ids, nullptr);
      result->ends.push_back(result->ids.size());
    }
  };
  const std::size_t workers =
      std::min(part_ends.size(), static_cast<std::size_t>(std::max(threads, 1)));
  if (workers <= 1) {
    Lease worker(*this);
    encode(0, texts.size(), worker.operator->(), out);
    worker.Finish();
    return;
  }
  std::vector<Encoding> parts(part_ends.size());
  std::vector<std::exception_ptr> errors(workers);
  std::atomic<std::size_t> next{0};
  const auto work = [&](std::size_t w) {
    try {
      Lease worker(*this);
      for (std::size_t p = next++; p < parts.size(); p = next++) {
        encode(p == 0 ? 0 : part_ends[p - 1], part_ends[p], worker.operator->(), &parts[p]);
      }
      worker.Finish();
    } catch (...) {
      errors[w] = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  for (std::size_t w = 1; w < workers; ++w) {
    try {
      pool.emplace_back(work, w);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the others do the work
    }
  }
  work(0);
  for (std::thread& thread : pool) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  std::size_t total = 0;
  for (const Encoding& part : parts) total += part.ids.size();
  out->ids.Reserve(total);
  for (const Encoding& part : parts) {
    const std::size_t base = out->ids.size();
    out->ids.Append(part.ids.data(), part.ids.size());
    for (const std::uint64_t end : part.ends) out->ends.push_back(base + end);
  }
}

void Tokenizer::EncodeWords(std::string_view text, bool find_special, const Coin& coin,
                            std::uint64_t number, IdBuffer* ids, WordMap* words) const {
  if (coin.threshold != 0 && student_ == nullptr) {
    throw std::invalid_argument("student_prob needs a second vocabulary");
  }
  Lease worker(*this);
  worker->Encode(text, find_special, coin, number, ids, words);
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
  Encoding encoding;
  Encode(parts, find_special, Coin(), 0, threads, &encoding);
  if (ids->size() == 0) {
    *ids = std::move(encoding.ids);
  } else {
    ids->Append(encoding.ids.data(), encoding.ids.size());
  }
}

void Tokenizer::EncodeSpans(std::string_view text, bool find_special, IdBuffer* ids,
                            std::vector<Span>* spans) const {
  WordBatch batch;
  batch.TrackSources();
  std::vector<std::int32_t> cut;
  std::vector<std::uint32_t> ends;
  std::uint32_t at_char = 0;
  SplitAtSpecial(text, find_special, [&](std::string_view part, std::int32_t id) {
    if (id >= 0) {
      // (Special pieces are ASCII in every BERT; counted all the same.)
      std::uint32_t size = 0;
      for (const char c : teacher_->piece(id)) size += (c & 0xC0) != 0x80;
      ids->Append(&id, 1);
      spans->push_back({at_char, at_char + size});
      at_char += size;
      return;
    }
    batch.RestartSources(at_char);
    std::size_t at = 0;
    do {
      at = splitter_.Fill(part, at, &batch);
      for (std::size_t i = 0; i < batch.size(); ++i) {
        cut.clear();
        ends.clear();
        teacher_->Cut(batch[i], &cut, &ends);
        ids->Append(cut.data(), cut.size());
        std::uint32_t from = batch.start(i);
        for (const std::uint32_t end : ends) {
          const std::uint32_t to = batch.start(i) + end;
          spans->push_back({batch.source_begin(from, to), batch.source_end(from, to)});
          from = to;
        }
      }
      batch.Clear();
    } while (at < part.size());
    at_char = batch.source_at();
  });
}

}  // namespace mvbert
