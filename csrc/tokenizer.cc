#include "tokenizer.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "lexicon.h"
#include "philox.h"
#include "philox_blocks.h"
#include "share.h"
#include "unicode.h"

namespace mvbert {
namespace {

// The pieces of a word in one number: a few ids, or a place in a pool of ids. Narrow: up to four ids
// below 2^16 - 1 in 16 bits each, the unused ones all ones; of a place the first 16 bits are all ones.
// Wide, for large vocabularies: up to three ids below 2^20, their count in the top bits; zero there
// means a place. Both write ids in one go, whatever their count: no branch to guess wrong.
using Pieces = std::uint64_t;

struct Narrow {
  static constexpr std::size_t kMost = 4;
  static constexpr std::uint64_t kLimit = 0xFFFF;  // ids must be below

  static Pieces Pack(const std::int32_t* ids, std::size_t count) {
    Pieces packed = ~Pieces{0};
    for (std::size_t i = count; i-- > 0;) packed = packed << 16 | static_cast<std::uint64_t>(ids[i]);
    return packed;
  }
  static Pieces Place(std::size_t offset, std::size_t count) {
    return std::uint64_t{count} << 48 | std::uint64_t{offset} << 16 | 0xFFFF;
  }
  static bool IsPlace(Pieces pieces) { return (pieces & 0xFFFF) == 0xFFFF; }
  static std::size_t Offset(Pieces place) { return place >> 16 & 0xFFFFFFFF; }
  static std::size_t Count(Pieces place) { return place >> 48; }
  // Writes kMost ids and returns how many count.
  static std::size_t Unpack(Pieces pieces, std::int32_t* out) {
#ifdef __SSE2__
    const __m128i ids = _mm_cvtsi64_si128(static_cast<long long>(pieces));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(ids, _mm_setzero_si128()));
#else
    for (std::size_t i = 0; i < kMost; ++i) out[i] = static_cast<std::uint16_t>(pieces >> 16 * i);
#endif
    return (63 - static_cast<std::size_t>(__builtin_clzll(~pieces))) / 16 + 1;
  }
};

struct Wide {
  static constexpr std::size_t kMost = 3;
  static constexpr std::uint64_t kLimit = std::uint64_t{1} << 20;

  static Pieces Pack(const std::int32_t* ids, std::size_t count) {
    Pieces packed = std::uint64_t{count} << 62;
    for (std::size_t i = 0; i < count; ++i) packed |= static_cast<std::uint64_t>(ids[i]) << 20 * i;
    return packed;
  }
  static Pieces Place(std::size_t offset, std::size_t count) {
    return std::uint64_t{count} << 32 | std::uint64_t{offset};
  }
  static bool IsPlace(Pieces pieces) { return pieces >> 62 == 0; }
  static std::size_t Offset(Pieces place) { return place & 0xFFFFFFFF; }
  static std::size_t Count(Pieces place) { return place >> 32; }
  static std::size_t Unpack(Pieces pieces, std::int32_t* out) {
    for (std::size_t i = 0; i < kMost; ++i) {
      out[i] = static_cast<std::int32_t>(pieces >> 20 * i & (kLimit - 1));
    }
    return pieces >> 62;
  }
};

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
    Clear();
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
      : teacher_(teacher),
        student_(student),
        narrow_(teacher.size() + (student == nullptr ? 0 : student->size()) <= Narrow::kLimit),
        sets_(kSets) {
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
        Set& set = sets_[SetOf(low, high, word.size())];
        if (set.slots[kWays - 1].low == 0 && Find(set, low, high) == nullptr) {
          Insert(&set, low, high, {padded, word.size()});
        }
      }
    }
  }

  // A copy that can grow by itself.
  explicit Cache(const Cache& seeds)
      : teacher_(seeds.teacher_),
        student_(seeds.student_),
        narrow_(seeds.narrow_),
        pool_(seeds.pool_),
        sets_(kSets) {
    sets_.CopyFrom(seeds.sets_);
  }

  // Appends the pieces of a batch's words to *ids. Texts end after text_ends[i] of the batch's words,
  // ascending; each time the size of *ids goes to *ends. choices[w] is 1 where the student cuts word w,
  // null where it cuts none. With `words`, tells where each begins.
  void Look(const WordBatch& batch, const std::uint8_t* choices,
            const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
            std::vector<std::uint64_t>* ends, WordMap* words) {
    std::uint32_t* starts = nullptr;
    if (words != nullptr) {
      if (choices == nullptr) {
        words->from_student.resize(words->from_student.size() + batch.size(), 0);
      } else {
        words->from_student.insert(words->from_student.end(), choices, choices + batch.size());
      }
      words->starts.resize(words->starts.size() + batch.size());
      starts = words->starts.data() + words->starts.size() - batch.size();
    }
    const auto look = [&](auto format) {
      using Format = decltype(format);
      if (choices == nullptr) {
        LookUp<Format, false>(batch, choices, text_ends, ids, ends, starts);
      } else {
        LookUp<Format, true>(batch, choices, text_ends, ids, ends, starts);
      }
    };
    if (narrow_) {
      look(Narrow());
    } else {
      look(Wide());
    }
  }

  bool overfull() const { return pool_.size() > kPoolLimit; }

 private:
  static constexpr int kBits = 16;
  static constexpr std::size_t kSets = std::size_t{1} << kBits;
  static constexpr std::size_t kWays = 4;
  static constexpr std::size_t kLongest = 48;  // bytes of a word that is remembered

  struct Slot {
    std::uint64_t low, high;  // the word, padded with zeros
    Pieces pieces[2];         // the teacher's, the student's
  };
  // Two cache lines. Words that are met again move to the first, the only one that is prefetched.
  struct alignas(128) Set {
    Slot slots[kWays];
  };
  struct alignas(64) LongSlot {
    char word[kLongest];
    Pieces pieces[2];
  };

  static std::size_t SetOf(std::uint64_t low, std::uint64_t high, std::size_t size) {
    return HashShortWord(low, high, size) >> (64 - kBits);
  }

  static Slot* Find(Set& set, std::uint64_t low, std::uint64_t high) {
    for (Slot& slot : set.slots) {
      if (slot.low == low && slot.high == high) return &slot;
    }
    return nullptr;
  }

  template <typename Format, bool kMixed>
  void LookUp(const WordBatch& batch, const std::uint8_t* choices,
              const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
              std::vector<std::uint64_t>* ends, std::uint32_t* word_starts) {
    // Two passes over 64 words at a time: the first finds their places and asks for the memory, so
    // that the second need not wait for it.
    constexpr std::size_t kGroup = 64;
    std::uint64_t lows[kGroup], highs[kGroup];
    std::uint32_t places[kGroup];
    const std::size_t count = batch.size();
    auto text_end = text_ends.begin();
    for (std::size_t first = 0; first < count; first += kGroup) {
      const std::size_t n = std::min(kGroup, count - first);
      for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t start = batch.start(first + i);
        const std::uint32_t size = batch.end(first + i) - start;
        ShortWord(batch.bytes() + start, std::min<std::uint32_t>(size, 16), &lows[i], &highs[i]);
        const std::size_t place = SetOf(lows[i], highs[i], size);
        __builtin_prefetch(&sets_[place]);
        places[i] = size <= 16 ? static_cast<std::uint32_t>(place) : kNoPlace;
      }
      ids->Reserve(kStride * n + kStride);
      std::int32_t* out = ids->end();
      for (std::size_t i = 0; i < n;) {
        for (; text_end != text_ends.end() && *text_end == first + i; ++text_end) {
          ends->push_back(static_cast<std::uint64_t>(out - ids->data()));
        }
        const std::size_t stop =
            text_end == text_ends.end() ? n : std::min<std::size_t>(n, *text_end - first);
        for (; i < stop; ++i) {
          const std::size_t which = kMixed ? choices[first + i] : 0;
          if (word_starts != nullptr) {
            word_starts[first + i] = static_cast<std::uint32_t>(out - ids->data());
          }
          Pieces pieces;
          if (__builtin_expect(places[i] != kNoPlace, 1)) {
            const Set& set = sets_[places[i]];
            const bool at0 = (set.slots[0].low == lows[i]) & (set.slots[0].high == highs[i]);
            const bool at1 = (set.slots[1].low == lows[i]) & (set.slots[1].high == highs[i]);
            if (__builtin_expect(at0 | at1, 1)) {
              pieces = set.slots[at1].pieces[which];  // no branch on which of them
            } else {
              pieces = Further(places[i], lows[i], highs[i], batch[first + i])->pieces[which];
            }
          } else {
            pieces = LongWord(batch[first + i], which);
          }
          if (__builtin_expect(!Format::IsPlace(pieces), 1)) {
            out += Format::Unpack(pieces, out);
          } else {
            const std::size_t length = Format::Count(pieces);
            const std::int32_t* from = pool_.data() + Format::Offset(pieces);
            if (length <= kStride) {
              std::memcpy(out, from, kStride * sizeof(std::int32_t));
            } else {
              ids->SetEnd(out);
              ids->Reserve(length + kStride * n + kStride);
              out = ids->end();
              std::memcpy(out, from, length * sizeof(std::int32_t));
            }
            out += length;
          }
        }
      }
      ids->SetEnd(out);
    }
    for (; text_end != text_ends.end(); ++text_end) ends->push_back(ids->size());
  }

  Pieces Pack(const std::int32_t* cut, std::size_t count) {
    bool fits = count <= (narrow_ ? Narrow::kMost : Wide::kMost);
    for (std::size_t i = 0; fits && i < count; ++i) {
      fits = static_cast<std::uint64_t>(cut[i]) < (narrow_ ? Narrow::kLimit : Wide::kLimit);
    }
    if (fits) return narrow_ ? Narrow::Pack(cut, count) : Wide::Pack(cut, count);
    if (count >= kMostInPool) throw std::length_error("a word of 2^16 pieces");
    const std::size_t offset = pool_.size();
    pool_.insert(pool_.end(), cut, cut + count);
    pool_.resize((pool_.size() + kStride - 1) / kStride * kStride);  // for reading them at once
    return narrow_ ? Narrow::Place(offset, count) : Wide::Place(offset, count);
  }

  Pieces Cut(const WordPiece& vocabulary, std::string_view word, std::int32_t base) {
    cut_.clear();
    vocabulary.Cut(word, &cut_);
    for (std::int32_t& id : cut_) id += base;
    return Pack(cut_.data(), cut_.size());
  }

  void CutBoth(std::string_view word, Pieces pieces[2]) {
    pieces[0] = Cut(teacher_, word, 0);
    pieces[1] = student_ == nullptr
                    ? 0
                    : Cut(*student_, word, static_cast<std::int32_t>(teacher_.size()));
  }

  // A word that is not in the first line of its set, brought there.
  __attribute__((noinline)) const Slot* Further(std::uint32_t place, std::uint64_t low,
                                                std::uint64_t high, std::string_view word) {
    Set& set = sets_[place];
    for (std::size_t way = 2; way < kWays; ++way) {
      if (set.slots[way].low != low || set.slots[way].high != high) continue;
      std::swap(set.slots[way], set.slots[1]);
      return &set.slots[1];
    }
    return Insert(&set, low, high, word);
  }

  // Puts a word into the first free slot, or else into one of the second line.
  Slot* Insert(Set* set, std::uint64_t low, std::uint64_t high, std::string_view word) {
    std::size_t way = 0;
    while (way < kWays && set->slots[way].low != 0) ++way;
    if (way == kWays) way = 2 + (next_victim_++ & 1);
    Slot* slot = &set->slots[way];
    CutBoth(word, slot->pieces);
    slot->low = low;
    slot->high = high;
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
    if (long_ == nullptr) long_ = std::make_unique<ZeroedTable<LongSlot>>(kSets);
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
  static constexpr std::size_t kStride = 8;  // room for each word's ids
  static constexpr std::size_t kMostInPool = std::size_t{1} << 16;

  const WordPiece& teacher_;
  const WordPiece* student_;
  const bool narrow_;  // how pieces are packed
  std::vector<std::int32_t> cut_;
  std::vector<std::int32_t> pool_;
  ZeroedTable<Set> sets_;
  std::size_t next_victim_ = 0;
  std::unique_ptr<ZeroedTable<LongSlot>> long_;
};

// ---- one thread's work ----------------------------------------------------------------------

class Tokenizer::Worker {
 public:
  explicit Worker(const Tokenizer& tokenizer)
      : tokenizer_(tokenizer), cache_(std::make_unique<Cache>(*tokenizer.seeds_)) {}

  // Words of several texts are looked up together, so short texts cost what long ones do.
  void Encode(const std::string_view* texts, std::size_t count, const TextOptions& options,
              std::uint64_t first_number, IdBuffer* ids, std::vector<std::uint64_t>* ends,
              WordMap* words) {
    mixed_ = options.coin.threshold != 0;
    threshold_ = options.coin.threshold;
    if (key_seed_ != options.coin.seed) group_ = kNoGroup;
    key_seed_ = options.coin.seed;
    for (std::size_t i = 0; i < count; ++i) {
      number_ = first_number + i;
      word_ = 0;
      tokenizer_.SplitAtSpecial(
          texts[i], options.find_special, [&](std::string_view part, std::int32_t id) {
            if (id < 0) return Read(part, options.limit, ids, ends, words);
            Look(ids, ends, words);
            AddSpecial(id, ids, words);
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
      cache_->Look(batch_, mixed_ ? choices_.data() : nullptr, text_ends_, ids, ends, words);
      if (cache_->overfull()) cache_ = std::make_unique<Cache>(*tokenizer_.seeds_);
    }
    batch_.Clear();
    text_ends_.clear();
    choices_.clear();
  }

  void AddSpecial(std::int32_t id, IdBuffer* ids, WordMap* words) {
    Draw(1);
    const bool student = mixed_ && choices_[0] != 0;
    choices_.clear();
    if (words != nullptr) {
      words->starts.push_back(static_cast<std::uint32_t>(ids->size()));
      words->from_student.push_back(student);
    }
    if (student) id = StudentSpecial(id);
    ids->Append(&id, 1);
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
        for (std::uint32_t i = 0; i < 16; ++i) first[i] = static_cast<std::uint32_t>(16 * group) + i;
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

  std::int32_t StudentSpecial(std::int32_t id) const {
    for (const auto* pieces : {&tokenizer_.special_, &tokenizer_.normalized_}) {
      for (const SpecialPiece& special : *pieces) {
        if (special.id != id) continue;
        std::vector<std::int32_t> cut;
        tokenizer_.student_->Cut(special.piece, &cut);
        return cut[0] + static_cast<std::int32_t>(tokenizer_.teacher_->size());
      }
    }
    return id;
  }

  const Tokenizer& tokenizer_;
  std::unique_ptr<Cache> cache_;
  WordBatch batch_;
  std::vector<std::uint32_t> text_ends_;  // texts that end within the batch, in its words
  std::vector<std::uint8_t> choices_;     // of the batch's words, if there is a coin
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
                     std::vector<SpecialPiece> special)
    : splitter_(options),
      teacher_(std::move(teacher)),
      student_(std::move(student)) {
  if (teacher_ == nullptr) throw std::invalid_argument("a tokenizer needs a vocabulary");
  if (student_ != nullptr &&
      teacher_->size() + student_->size() >
          static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::invalid_argument("the two vocabularies have more than 2^31 - 1 pieces together");
  }
  for (const auto& [piece, id, normalized] : special) {
    if (piece.empty() || piece.find_first_of(" \t\r\n") != std::string::npos) {
      throw std::invalid_argument("a special piece must have letters and no space, got '" + piece +
                                  "'");
    }
    if (id < 0 || static_cast<std::size_t>(id) >= teacher_->size()) {
      throw std::invalid_argument("special piece '" + piece + "' has id " + std::to_string(id) +
                                  ", outside the vocabulary");
    }
    if (!normalized) {
      special_.push_back({piece, id, false});
      if (special_bytes_.find(piece[0]) == std::string::npos) special_bytes_ += piece[0];
      continue;
    }
    Words words;
    splitter_.Split(piece, &words);
    if (words.bytes.empty()) continue;  // it is made of what is deleted: no text has it
    const auto first = static_cast<unsigned char>(words.bytes[0]);
    normalized_bytes_[first] = true;
    if (first >= 'a' && first <= 'z') normalized_bytes_[first - 32] = true;
    for (std::size_t byte = 0xC2; byte < 0xF5; ++byte) normalized_bytes_[byte] = true;
    normalized_.push_back({words.bytes, id, true});
  }
  seeds_ = std::make_unique<const Cache>(*teacher_, student_.get());
}

Tokenizer::~Tokenizer() {
  ForgetWords();
  for (auto& place : buffers_) std::free(place.exchange(nullptr));
}

void Tokenizer::ForgetWords() const {
  for (auto& place : idle_) delete place.exchange(nullptr);
}

// The end of a special piece at text[at], written out (0: there is none), its id through *id.
std::size_t Tokenizer::SpecialAt(std::string_view text, std::size_t at, std::int32_t* id) const {
  std::size_t length = 0;
  for (const auto& [piece, special_id, normalized] : special_) {
    if (piece.size() > length && text.compare(at, piece.size(), piece) == 0) {
      length = piece.size();
      *id = special_id;
    }
  }
  return length == 0 ? 0 : at + length;
}

// As SpecialAt, for a piece with deleted characters inside, or written with a character that NFC
// replaces: the definition keeps it whole in cased text if nothing but space is around it.
std::size_t Tokenizer::CleanedSpecialAt(std::string_view text, std::size_t begin, std::size_t at,
                                        std::int32_t* id) const {
  const auto separates = [](CharKind kind) {
    return kind == kSpace || kind == kCjk || kind == kMapCjk;
  };
  for (std::size_t before = at; before > begin;) {
    do {
      --before;
    } while ((text[before] & 0xC0) == 0x80);
    const char* p = text.data() + before;
    const CharKind kind = KindOf(EntryOf<Casing::kCased>(DecodeUtf8(&p)));
    if (separates(kind)) break;
    if (kind != kDrop) return 0;
  }
  const char* const end = text.data() + text.size();
  std::vector<SourceChar> composed;
  for (const auto& [piece, special_id, normalized] : special_) {
    const char* p = text.data() + at;
    std::size_t same = 0;
    while (p < end && same < piece.size()) {
      const char32_t code = DecodeUtf8(&p);
      if (KindOf(EntryOf<Casing::kCased>(code)) == kDrop) continue;
      composed.clear();
      Decompose({code, 0, 1}, &composed);
      Compose(&composed);
      const char* wanted = piece.data() + same;
      if (composed.size() != 1 || composed[0].code != DecodeUtf8(&wanted)) break;
      same = static_cast<std::size_t>(wanted - piece.data());
    }
    if (same < piece.size()) continue;
    const auto after = static_cast<std::size_t>(p - text.data());
    while (true) {
      std::int32_t next = 0;
      if (p == end || SpecialAt(text, static_cast<std::size_t>(p - text.data()), &next) != 0) break;
      const CharKind kind = KindOf(EntryOf<Casing::kCased>(DecodeUtf8(&p)));
      if (separates(kind)) break;
      if (kind != kDrop) return 0;
    }
    *id = special_id;
    return after;
  }
  return 0;
}

// The end of a normalised piece of text that begins at text[at] (0: there is none), the longest.
std::size_t Tokenizer::NormalizedAt(std::string_view text, std::size_t at,
                                    std::int32_t* id) const {
  const SplitOptions& options = splitter_.options();
  const auto entry_of = [&options](char32_t code) {
    if (!options.lowercase) return EntryOf<Casing::kCased>(code);
    return options.strip_accents ? EntryOf<Casing::kUncased>(code)
                                 : EntryOf<Casing::kAccented>(code);
  };
  const char* const end = text.data() + text.size();
  std::size_t longest = 0, found = 0;
  std::vector<SourceChar> letters;
  for (const auto& [piece, special_id, normalized] : normalized_) {
    if (piece.size() <= longest) continue;
    std::string_view rest = piece;
    const char* p = text.data() + at;
    while (p < end && !rest.empty()) {
      const char* const start = p;
      const char32_t code = DecodeUtf8(&p);
      const CharEntry entry = entry_of(code);
      const CharKind kind = KindOf(entry);
      if (kind == kDrop || kind == kMark) {
        if (rest.size() == piece.size()) break;  // it belongs to what stands before
        continue;
      }
      std::string_view made(start, static_cast<std::size_t>(p - start));
      std::string decomposed;
      if (kind == kMapLetters || kind == kMapPunct || kind == kMapCjk) {
        made = Replacement(entry);
      } else if (kind == kHangul) {
        letters.clear();
        Decompose({code, 0, 1}, &letters);
        for (const SourceChar& letter : letters) {
          char utf8[4];
          decomposed.append(utf8, static_cast<std::size_t>(EncodeUtf8(letter.code, utf8) - utf8));
        }
        made = decomposed;
      }
      if (rest.compare(0, made.size(), made) != 0) break;
      rest.remove_prefix(made.size());
    }
    if (!rest.empty()) continue;
    longest = piece.size();
    found = static_cast<std::size_t>(p - text.data());
    *id = special_id;
  }
  return found;
}

template <typename Found>
bool Tokenizer::SplitAtNormalized(std::string_view text, Found&& found) const {
  std::size_t begin = 0;
  for (std::size_t at = 0; !normalized_.empty() && at < text.size();) {
    std::int32_t id = -1;
    const bool candidate = normalized_bytes_[static_cast<unsigned char>(text[at])];
    const std::size_t end = candidate ? NormalizedAt(text, at, &id) : 0;
    if (end == 0) {
      ++at;
      continue;
    }
    if (at > begin && !found(text.substr(begin, at - begin), -1)) return false;
    if (!found(text.substr(at, end - at), id)) return false;
    begin = at = end;
  }
  return begin == text.size() || found(text.substr(begin), -1);
}

template <typename Found>
void Tokenizer::SplitAtSpecial(std::string_view text, bool find_special, Found&& found) const {
  if (!find_special) {
    if (!text.empty()) found(text, -1);
    return;
  }
  std::size_t part = 0;   // where the last special piece that was written out ends
  std::size_t begin = 0;  // what is not yet found
  std::size_t at = 0;
  while (at < text.size()) {
    // Leftmost first, then longest, as Hugging Face's trie finds them.
    at = special_bytes_.size() == 1 ? text.find(special_bytes_[0], at)  // at memory speed
                                    : text.find_first_of(special_bytes_, at);
    if (at == std::string_view::npos) break;
    std::int32_t id = -1;
    std::size_t end = SpecialAt(text, at, &id);
    if (end != 0) {
      part = end;
    } else if (!splitter_.options().lowercase) {
      end = CleanedSpecialAt(text, part, at, &id);
    }
    if (end == 0) {
      ++at;
      continue;
    }
    if (at > begin && !SplitAtNormalized(text.substr(begin, at - begin), found)) return;
    if (!found(text.substr(at, end - at), id)) return;
    begin = at = end;
  }
  if (begin < text.size()) SplitAtNormalized(text.substr(begin), found);
}

void Tokenizer::CheckCoin(const Coin& coin) const {
  if (coin.threshold != 0 && student_ == nullptr) {
    throw std::invalid_argument("student_prob needs a second vocabulary");
  }
}

void Tokenizer::EncodeParts(const std::vector<std::string_view>& texts, const TextOptions& options,
                            std::uint64_t first_number, int threads,
                            std::vector<Encoding>* out) const {
  CheckCoin(options.coin);
  // Parts of about 256 KiB: threads stay busy to the end, and their memory is used again.
  constexpr std::size_t kPart = std::size_t{1} << 18;
  std::vector<std::size_t> begins = {0};
  std::size_t bytes = 0;
  for (std::size_t i = 0; i + 1 < texts.size(); ++i) {
    bytes += texts[i].size();
    if (bytes >= kPart) {
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
      worker->Encode(texts.data() + begins[p], begins[p + 1] - begins[p], options,
                     first_number + begins[p], &parts[p].ids, &parts[p].ends, nullptr);
    }
    worker.Finish();
  });
}

void Tokenizer::Encode(const std::vector<std::string_view>& texts, const TextOptions& options,
                       std::uint64_t first_number, int threads, Encoding* out) const {
  if (threads <= 1) {
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
    if (part.ids.capacity() != kPartIds) continue;  // it has grown
    std::int32_t* expected = nullptr;
    while (place != buffers_.end() &&
           !place->compare_exchange_strong(expected, part.ids.data(), std::memory_order_release)) {
      expected = nullptr;
      ++place;
    }
    if (place == buffers_.end()) break;
    part.ids.Release();
  }
  parts->clear();
}

void Tokenizer::EncodeWords(std::string_view text, const TextOptions& options,
                            std::uint64_t number, IdBuffer* ids, WordMap* words) const {
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
                            std::vector<Span>* spans) const {
  WordBatch batch;
  batch.TrackSources();
  std::vector<std::int32_t> cut;
  std::vector<std::uint32_t> ends;
  std::uint32_t at_char = 0;
  SplitAtSpecial(text, find_special, [&](std::string_view part, std::int32_t id) {
    if (id >= 0) {
      std::uint32_t size = 0;
      for (const char c : part) size += (c & 0xC0) != 0x80;
      ids->Append(&id, 1);
      spans->push_back({at_char, at_char + size});
      at_char += size;
      return true;
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
    return true;
  });
}

}  // namespace mvbert
