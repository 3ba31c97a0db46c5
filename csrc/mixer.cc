#include "mixer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "huge_pages.h"
#include "philox.h"
#include "philox_blocks.h"
#include "share.h"

namespace mvbert {
namespace {

constexpr std::int32_t kIgnoreIndex = -100;
constexpr std::uint32_t kOrderRounds = 6;
constexpr std::uint64_t kAll = 0xFFFFFFFFu;
constexpr std::uint64_t kRowsPerChunk = 64;    // whose starts are computed together
constexpr std::uint64_t kRowsPerThread = 256;  // below that a thread costs more than it brings

[[noreturn]] void Refuse(const std::string& message) { throw std::invalid_argument(message); }

// Number k of 0, 1, 2, ... without the listed ones.
template <typename Number>
inline Number Outside(Number k, const Number* listed, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) k += static_cast<Number>(k >= listed[i]);
  return k;
}

// (x + y) % n for x and y below n, at most 2^31.
inline std::uint32_t AddModulo(std::uint32_t x, std::uint32_t y, std::uint32_t n) {
  const std::uint32_t sum = x + y;
  return sum >= n ? sum - n : sum;
}

std::array<std::uint32_t, 3> Rest(Purpose purpose, std::uint64_t number, std::uint32_t round = 0) {
  return {static_cast<std::uint32_t>(purpose) + 256 * round, static_cast<std::uint32_t>(number),
          static_cast<std::uint32_t>(number >> 32)};
}

}  // namespace

// ---- piece table -------------------------------------------------------------------------

PieceTable::PieceTable(const Segments* teacher, const Segments* student) {
  if (!teacher && !student) Refuse("rows need the segmentation of at least one vocabulary");
  if (teacher && student && teacher->words != student->words) {
    Refuse("teacher and student segmentations must be of one lexicon, got " +
           std::to_string(teacher->words) + " and " + std::to_string(student->words) + " words");
  }
  struct Part {
    const char* name;
    const Segments* segments;
  };
  std::vector<Part> parts;
  if (teacher) parts.push_back({"teacher", teacher});
  if (student) parts.push_back({"student", student});
  words_ = parts[0].segments->words;
  if (words_ == 0) Refuse("a segmentation must have at least word 0, the end of a document");

  std::int64_t base = 0;
  std::size_t long_pieces = 0;
  for (const Part& part : parts) {
    const Segments& s = *part.segments;
    const std::string who = part.name;
    const auto inside = [&](std::int32_t id) { return id >= 0 && id < s.size; };
    std::uint32_t begin = 0;
    for (std::size_t word = 0; word < words_; ++word) {
      const std::uint32_t end = s.ends[word];
      if (end < begin || end > s.pieces) {
        Refuse("the " + who + " segmentation ends word " + std::to_string(word) + " at piece " +
               std::to_string(end) + ", outside [" + std::to_string(begin) + ", " +
               std::to_string(s.pieces) + "]");
      }
      if (word > 0 && end == begin) {
        Refuse("the " + who + " segmentation has no pieces for word " + std::to_string(word));
      }
      if (word > 0 && end - begin > kInline) long_pieces += end - begin;
      begin = end;
    }
    for (std::uint32_t i = s.ends[0]; i < begin; ++i) {
      if (!inside(s.ids[i])) {
        Refuse(who + " ids must lie in [0, " + std::to_string(s.size) + "), got " +
               std::to_string(s.ids[i]) + ": was the lexicon cut with another vocabulary?");
      }
    }

    Side side;
    side.base = static_cast<std::int32_t>(base);
    side.special = s.special;
    std::sort(side.special.begin(), side.special.end());
    side.special.erase(std::unique(side.special.begin(), side.special.end()), side.special.end());
    for (const std::int32_t id : {s.cls, s.sep, s.mask}) {
      if (!inside(id)) Refuse("the " + who + " vocabulary has no id " + std::to_string(id));
    }
    for (const std::int32_t id : side.special) {
      if (!inside(id)) Refuse("the " + who + " vocabulary has no id " + std::to_string(id));
    }
    if (static_cast<std::size_t>(s.size) <= side.special.size()) {
      Refuse("the " + who + " vocabulary has only special pieces");
    }
    side.ordinary =
        static_cast<std::uint32_t>(s.size) - static_cast<std::uint32_t>(side.special.size());
    base += s.size;
    if (base > std::numeric_limits<std::int32_t>::max()) {
      Refuse("the two vocabularies together have more than 2^31 - 1 pieces");
    }
    side.cls = side.base + s.cls;
    side.sep = side.base + s.sep;
    side.mask = side.base + s.mask;
    sides_.push_back(std::move(side));
  }
  if (long_pieces > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    Refuse("the words of more than three pieces have more than 2^31 - 1 pieces together");
  }

  records_.reserve(words_ * parts.size());
  AdviseHugePages(records_.data(), words_ * parts.size() * sizeof(Record));
  records_.resize(words_ * parts.size());
  long_ids_.reserve(long_pieces);
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const Segments& s = *parts[p].segments;
    records_[p] = {{0, 0, 0}, kMark};
    for (std::size_t word = 1; word < words_; ++word) {
      const std::int32_t* ids = s.ids + s.ends[word - 1];
      Record& record = records_[word * parts.size() + p];
      record = {{0, 0, 0}, s.ends[word] - s.ends[word - 1]};
      if (record.count <= kInline) {
        for (std::uint32_t i = 0; i < record.count; ++i) record.ids[i] = sides_[p].base + ids[i];
      } else {
        record.ids[0] = static_cast<std::int32_t>(long_ids_.size());
        for (std::uint32_t i = 0; i < record.count; ++i) {
          long_ids_.push_back(sides_[p].base + ids[i]);
        }
      }
    }
  }
}

StreamTotals StreamTotals::Of(const PieceTable& table, const std::uint32_t* stream,
                              std::size_t size, int threads) {
  constexpr std::size_t kEntries = std::size_t{1} << 20;  // a part; less is not worth a thread
  const std::size_t sides = table.sides_.size();
  std::vector<StreamTotals> parts(size / kEntries + 1);
  ShareRanges(
      size, parts.size(), threads, [&](std::size_t first, std::size_t last, std::size_t part) {
        StreamTotals sum;
        for (std::size_t i = first; i < last; ++i) {
          if (__builtin_expect(stream[i] >= table.words_, 0)) {
            Refuse("the stream's entry " + std::to_string(i) + " is word " +
                   std::to_string(stream[i]) + ", the segmentation has " +
                   std::to_string(table.words_) + " words: were they made from another corpus?");
          }
          sum.marks += stream[i] == 0;
          const PieceTable::Record* record = table.records_.data() + stream[i] * sides;
          for (std::size_t side = 0; side < sides; ++side) {
            sum.pieces[side] += record[side].count == PieceTable::kMark ? 1 : record[side].count;
          }
        }
        parts[part] = sum;
      });
  StreamTotals total;
  for (const StreamTotals& part : parts) {
    total.marks += part.marks;
    for (int side = 0; side < 2; ++side) total.pieces[side] += part.pieces[side];
  }
  return total;
}

// ---- where rows start --------------------------------------------------------------------

Mixer::Mixer(const PieceTable& table, const std::uint32_t* stream, std::size_t stream_size,
             MixerOptions options)
    : table_(table),
      stream_(stream),
      stream_size_(stream_size),
      options_(std::move(options)),
      rows_(0) {
  const MixerOptions& o = options_;
  if (o.T < 8 || o.T > 65535) Refuse("T must lie in [8, 65535], got " + std::to_string(o.T));
  if (o.stride < 1 || o.stride > stream_size) {
    Refuse("the stride must lie in [1, " + std::to_string(stream_size) + "], got " +
           std::to_string(o.stride));
  }
  if (o.capacity > o.T || o.budgets.size() != o.T - 1) {
    Refuse("a row of T = " + std::to_string(o.T) + " needs a capacity of at most T and T - 1 " +
           "budgets, got " + std::to_string(o.capacity) + " and " +
           std::to_string(o.budgets.size()));
  }
  for (const std::uint32_t budget : o.budgets) {
    if (budget > o.capacity) Refuse("a budget is above the capacity");
  }
  if (std::all_of(stream, stream + stream_size, [](std::uint32_t word) { return word == 0; })) {
    Refuse("the stream has no word, only marks of documents");
  }
  rows_ = stream_size / o.stride;
  if (rows_ >> 62) Refuse("an epoch may have at most 2^62 rows");
  std::uint64_t root = 0;
  for (std::uint64_t bit = std::uint64_t{1} << 31; bit != 0; bit >>= 1) {
    if ((root + bit) * (root + bit) < rows_) root += bit;
  }
  side_[0] = static_cast<std::uint32_t>(root + 1);
  side_[1] = static_cast<std::uint32_t>((rows_ + root) / (root + 1));
}

void Mixer::Starts(std::uint64_t start, std::size_t count, std::uint64_t* first) const {
  const std::array<std::uint32_t, 2> key = PhiloxKey(options_.seed);
  const PhiloxBlocksFunction blocks = PhiloxBlocks();
  const std::uint32_t a = side_[0], b = side_[1];

  std::vector<std::uint32_t> pending;
  while (count > 0) {
    const std::uint64_t epoch = start / rows_, position = start % rows_;
    const std::size_t chunk =
        static_cast<std::size_t>(std::min<std::uint64_t>(count, rows_ - position));
    pending.resize(chunk);
    for (std::size_t i = 0; i < chunk; ++i) {
      first[i] = position + i;
      pending[i] = static_cast<std::uint32_t>(i);
    }
    // Results outside [0, rows_) go through the network again.
    while (!pending.empty()) {
      std::size_t left = 0;
      for (std::size_t at = 0; at < pending.size(); at += 16) {
        const std::size_t lanes = std::min<std::size_t>(16, pending.size() - at);
        std::uint32_t x[16] = {}, y[16] = {}, noise[64];  // value = x * b + y
        for (std::size_t i = 0; i < lanes; ++i) {
          const std::uint64_t value = first[pending[at + i]];
          x[i] = static_cast<std::uint32_t>(value / b);
          y[i] = static_cast<std::uint32_t>(value % b);
        }
        for (std::uint32_t round = 0; round < kOrderRounds; round += 2) {
          blocks(y, Rest(Purpose::kRowOrder, epoch, round), key, noise);
          for (int i = 0; i < 16; ++i) x[i] = AddModulo(x[i], BelowN(noise[i], a), a);
          blocks(x, Rest(Purpose::kRowOrder, epoch, round + 1), key, noise);
          for (int i = 0; i < 16; ++i) y[i] = AddModulo(y[i], BelowN(noise[i], b), b);
        }
        for (std::size_t i = 0; i < lanes; ++i) {
          const std::uint64_t id = std::uint64_t{x[i]} * b + y[i];
          first[pending[at + i]] = id;
          if (id >= rows_) pending[left++] = pending[at + i];
        }
      }
      pending.resize(left);
    }
    const auto epoch_bits =
        Philox4x32({0, static_cast<std::uint32_t>(Purpose::kEpochOffset),
                    static_cast<std::uint32_t>(epoch), static_cast<std::uint32_t>(epoch >> 32)},
                   key);
    const std::uint32_t offset = BelowN(epoch_bits[0], options_.stride);
    for (std::size_t i = 0; i < chunk; ++i) first[i] = first[i] * options_.stride + offset;
    first += chunk;
    start += chunk;
    count -= chunk;
  }
}

// ---- a row -------------------------------------------------------------------------------

// What one thread needs to make one row after another.
class Mixer::Scratch {
 public:
  explicit Scratch(const Mixer& mixer)
      : mixer_(mixer),
        options_(mixer.options_),
        key_(PhiloxKey(mixer.options_.seed)),
        blocks_(PhiloxBlocks()),
        coins_((options_.T + 63) / 64 * 64),
        draws_((2 * std::size_t{options_.T} + 4 + 63) / 64 * 64),
        ids_(options_.T + 4),
        starts_(options_.T),
        long_slots_(options_.T),
        breaks_(options_.T),
        excluded_(options_.T),
        order_(options_.T),
        others_(options_.T),
        masked_((options_.T + 63) / 64 + 1) {
    for (std::uint32_t i = 0; i < options_.T; ++i) order_[i] = i;
  }

  // Makes row `number`, which starts at entry `first` of the stream, in row `index` of `out`.
  template <bool kTwo>
  void Make(std::uint64_t number, std::uint64_t first, std::uint64_t student_threshold,
            std::uint64_t index, const Rows& out) {
    const std::uint32_t T = options_.T, M = options_.capacity;
    number_ = number;
    draws_made_ = 0;
    // Where there is nothing to toss, the coins stay 0 and the threshold says it all.
    student_threshold_ =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(student_threshold, kAll));
    if (kTwo && student_threshold > 0 && student_threshold <= kAll) {
      for (std::uint32_t i = 0; i < T; i += 64) {
        Blocks(i / 4, Purpose::kVocabulary, coins_.data() + i);
      }
    }

    std::uint32_t second = 0;  // where the drawn [SEP] goes; 0: nowhere
    if (Draw(0) < options_.pair_threshold) {
      Fill<kTwo>(first, T - 3);
      second = Boundary(Draw(1));
    }
    if (second == 0) Fill<kTwo>(first, T - 2);

    std::int32_t* ids = out.input_ids + index * T;
    ids[0] = SideOf<kTwo>(0).cls;
    ids[T - 1] = SideOf<kTwo>(T - 1).sep;
    std::uint8_t* types = out.token_type_ids + index * T;
    if (second == 0) {
      std::memcpy(ids + 1, ids_.data() + 1, sizeof(std::int32_t) * (T - 2));
      std::memset(types, 0, T);
    } else {
      std::memcpy(ids + 1, ids_.data() + 1, sizeof(std::int32_t) * (second - 1));
      ids[second] = SideOf<kTwo>(T - 2).sep;
      std::memcpy(ids + second + 1, ids_.data() + second, sizeof(std::int32_t) * (T - 2 - second));
      std::memset(types, 0, second + 1);
      std::memset(types + second + 1, 1, T - 1 - second);
    }
    if (M > 0) {
      Choose(second);
      Mask<kTwo>(ids, out.masked_positions + index * M, out.labels + index * M);
    }
  }

 private:
  void Blocks(std::uint32_t first, Purpose purpose, std::uint32_t out[64]) const {
    std::uint32_t counters[16];
    for (std::uint32_t i = 0; i < 16; ++i) counters[i] = first + i;
    blocks_(counters, Rest(purpose, number_), key_, out);
  }

  // Number i of the row's purpose kRow.
  std::uint32_t Draw(std::uint32_t i) {
    if (__builtin_expect(i >= draws_made_, 0)) DrawMore(i);
    return draws_[i];
  }

  __attribute__((noinline)) void DrawMore(std::uint32_t i) {
    for (; i >= draws_made_; draws_made_ += 64) {
      Blocks(draws_made_ / 4, Purpose::kRow, draws_.data() + draws_made_);
    }
  }

  template <bool kTwo>
  const PieceTable::Side& SideOf(std::uint32_t slot) const {
    return mixer_.table_.sides_[kTwo && coins_[slot] < student_threshold_];
  }

  // Lays words and [SEP]s into ids_[1, 1 + room) and notes where each slot, word or [SEP], starts.
  template <bool kTwo>
  void Fill(std::uint64_t first, std::uint32_t room) {
    const std::size_t end = 1 + room;
    // The next entry of the stream is entry[slot], and the stream ends before entry[wrap].
    const std::uint32_t* entry = mixer_.stream_ + first;
    std::size_t wrap = mixer_.stream_size_ - first;
    std::size_t slot = 0, at = 1, breaks = 0;
    while (true) {
      FillWords<kTwo>(entry, wrap, end, &slot, &at);
      if (at >= end) break;
      if (slot == wrap) {  // the end of the stream
        entry = mixer_.stream_ - slot;
        wrap = slot + mixer_.stream_size_;
        continue;
      }
      // The end of a document.
      if (slot == 0 || (breaks > 0 && breaks_[breaks - 1] + 1 == slot) || at + 1 == end) {
        // No [SEP] beside another special piece: not first, not twice, not before the last. A mark
        // that is passed over takes no slot.
        ++entry;
        --wrap;
        continue;
      }
      ids_[at++] = SideOf<kTwo>(static_cast<std::uint32_t>(slot) + 1).sep;
      breaks_[breaks++] = static_cast<std::uint32_t>(slot++);
    }
    starts_[slot] = static_cast<std::uint32_t>(end);  // the last word may be cut
    slots_ = static_cast<std::uint32_t>(slot);
    breaks_made_ = static_cast<std::uint32_t>(breaks);
    word_pieces_ = room - breaks_made_;
  }

  // The part of Fill that words go through, alone so that all it needs stays in registers. Stops at
  // `wrap`, at `end` and at the end of a document.
  template <bool kTwo>
  __attribute__((noinline)) void FillWords(const std::uint32_t* entry, std::size_t wrap,
                                           std::size_t end, std::size_t* slot_io,
                                           std::size_t* at_io) {
    const PieceTable::Record* const records = mixer_.table_.records_.data();
    const std::uint32_t* const coins = coins_.data() + 1;
    const std::uint32_t threshold = student_threshold_;
    std::int32_t* const ids = ids_.data();
    std::uint32_t* const starts = starts_.data();
    const auto record_of = [=](std::size_t slot) {
      std::size_t place = entry[slot];
      if (kTwo) place += place + (coins[slot] < threshold);
      return records + place;
    };
    std::uint32_t* long_slot = long_slots_.data();
    std::size_t slot = *slot_io, at = *at_io;
    for (; at < end && slot != wrap; ++slot) {
      const PieceTable::Record* const record = record_of(slot);
      // Three pieces and the count, whatever the count: the next word overwrites what is too much,
      // and ids_ has room behind its end.
      std::memcpy(ids + at, record->ids, sizeof(PieceTable::Record));
      starts[slot] = static_cast<std::uint32_t>(at);
      const std::size_t count = record->count;
      if (__builtin_expect(count == PieceTable::kMark, 0)) break;
      *long_slot = static_cast<std::uint32_t>(slot);
      long_slot += count > PieceTable::kInline;
      at += count;
    }
    // A longer word has only got its place. Which words are long cannot be predicted and their
    // pieces are often out of cache: here, one after the other, their loads wait together.
    for (const std::uint32_t* next = long_slots_.data(); next != long_slot; ++next) {
      constexpr std::size_t kStep = PieceTable::kInline + 1;  // no long word has fewer pieces
      const PieceTable::Record* const record = record_of(*next);
      const std::int32_t* const from = mixer_.table_.long_ids_.data() + record->ids[0];
      std::int32_t* const to = ids + starts[*next];
      // Only the row's last word is cut; then up to three pieces too many go behind `end`.
      const std::size_t room = std::max<std::size_t>(end - starts[*next], kStep);
      const std::size_t last = std::min<std::size_t>(record->count, room) - kStep;
      for (std::size_t i = 0; i < last; i += kStep) {
        std::memcpy(to + i, from + i, kStep * sizeof(std::int32_t));
      }
      std::memcpy(to + last, from + last, kStep * sizeof(std::int32_t));
    }
    *slot_io = slot;
    *at_io = at;
  }

  // The start, drawn by `bits`, of a word of the row's middle half that follows a word; 0 if there
  // is none.
  std::uint32_t Boundary(std::uint32_t bits) {
    const auto first_from = [&](std::uint32_t position) {
      return static_cast<std::uint32_t>(
          std::lower_bound(starts_.begin(), starts_.begin() + slots_, position) - starts_.begin());
    };
    // The first word starts at 1, before the middle of any row, so every slot here has one before.
    const std::uint32_t begin = first_from((options_.T + 3) / 4);
    const std::uint32_t end = first_from((3 * options_.T + 3) / 4);
    // Slots that are a [SEP] or follow one.
    std::uint32_t excluded = 0;
    for (std::uint32_t i = 0; i < breaks_made_; ++i) {
      for (const std::uint32_t slot : {breaks_[i], breaks_[i] + 1}) {
        if (slot >= begin && slot < end) excluded_[excluded++] = slot;
      }
    }
    if (end - begin == excluded) return 0;
    const std::uint32_t k = BelowN(bits, end - begin - excluded);
    return starts_[Outside(begin + k, excluded_.data(), excluded)];
  }

  // Marks the positions of the words to mask in masked_: the first steps of a Fisher-Yates shuffle
  // of the words, each taken if its pieces fit into what is left of the budget.
  __attribute__((noinline)) void Choose(std::uint32_t second) {
    // Local names, because a store to masked_ might change a member for all the compiler knows.
    const std::uint32_t* const starts = starts_.data();
    const std::uint32_t* const breaks = breaks_.data();
    std::uint32_t* const order = order_.data();
    std::uint32_t* const others = others_.data();
    std::uint64_t* const masked = masked_.data();
    std::fill(masked, masked + masked_.size(), 0);
    const std::uint32_t words = slots_ - breaks_made_, breaks_made = breaks_made_;
    const std::uint32_t boundary = second == 0 ? options_.T : second;
    std::uint32_t budget = options_.budgets[word_pieces_];
    std::uint32_t step = 0;
    for (; budget > 0 && step < words; ++step) {
      const std::uint32_t other = step + BelowN(Draw(2 + 2 * step), words - step);
      const std::uint32_t word = order[other];
      order[other] = order[step];
      others[step] = other;
      const std::uint32_t slot = Outside(word, breaks, breaks_made);
      const std::uint32_t start = starts[slot], length = starts[slot + 1] - start;
      if (length > budget) continue;
      budget -= length;
      // Words behind the drawn [SEP] have moved by one.
      std::uint32_t position = start + (start >= boundary);
      std::uint32_t left = length;
      for (; __builtin_expect(left >= 64, 0); left -= 63, position += 63) {
        SetBits(masked, position, 63);
      }
      SetBits(masked, position, left);
    }
    // Back to 0, 1, 2, ... for the next row.
    for (std::uint32_t i = 0; i < step; ++i) order[others[i]] = others[i];
  }

  // Sets `count` bits, 0 to 63, from bit `first` on; without a branch, since lengths of words
  // cannot be predicted. Touches the 64 bits after those of `first` too.
  static void SetBits(std::uint64_t* words, std::uint32_t first, std::uint32_t count) {
    const std::uint64_t bits = (std::uint64_t{1} << count) - 1;
    words[first / 64] |= bits << (first % 64);
    words[first / 64 + 1] |= bits >> 1 >> (63 - first % 64);
  }

  // Replaces the marked pieces and writes their positions and labels, in ascending order.
  template <bool kTwo>
  __attribute__((noinline)) void Mask(std::int32_t* ids, std::int32_t* positions,
                                      std::int32_t* labels) {
    const std::vector<PieceTable::Side>& sides = mixer_.table_.sides_;
    std::uint32_t j = 0;
    for (std::size_t i = 0; i + 1 < masked_.size(); ++i) {
      for (std::uint64_t set = masked_[i]; set != 0; set &= set - 1, ++j) {
        const std::uint32_t position =
            static_cast<std::uint32_t>(64 * i) + static_cast<std::uint32_t>(__builtin_ctzll(set));
        const std::int32_t id = ids[position];
        const PieceTable::Side& side = sides[kTwo && id >= sides[1].base];
        positions[j] = static_cast<std::int32_t>(position);
        labels[j] = id;
        // One number of [0, 10) with a fraction: the number says which of the three, the fraction
        // which piece.
        const std::uint64_t tenths = std::uint64_t{10} * Draw(3 + 2 * j);
        const std::uint32_t tenth = static_cast<std::uint32_t>(tenths >> 32);
        std::int32_t next = tenth < 8 ? side.mask : id;
        if (tenth == 8) {
          const std::uint32_t k = BelowN(static_cast<std::uint32_t>(tenths), side.ordinary);
          next = side.base +
                 Outside(static_cast<std::int32_t>(k), side.special.data(), side.special.size());
        }
        ids[position] = next;
      }
    }
    std::fill(positions + j, positions + options_.capacity, 0);
    std::fill(labels + j, labels + options_.capacity, kIgnoreIndex);
  }

  const Mixer& mixer_;
  const MixerOptions& options_;
  const std::array<std::uint32_t, 2> key_;
  const PhiloxBlocksFunction blocks_;
  std::uint64_t number_ = 0;
  std::uint32_t student_threshold_ = 0;
  std::uint32_t draws_made_ = 0;
  std::uint32_t slots_ = 0;
  std::uint32_t breaks_made_ = 0;
  std::uint32_t word_pieces_ = 0;
  std::vector<std::uint32_t> coins_;       // numbers of purpose kVocabulary; 0 where none is needed
  std::vector<std::uint32_t> draws_;       // numbers of purpose kRow, as far as made
  std::vector<std::int32_t> ids_;          // the row, and room for a record behind it
  std::vector<std::uint32_t> starts_;      // positions of slots, and the end of the last
  std::vector<std::uint32_t> long_slots_;  // words of more than three pieces, and room for one
  std::vector<std::uint32_t> breaks_;      // slots that are the [SEP] of a document
  std::vector<std::uint32_t> excluded_;    // slots where no second part may begin
  std::vector<std::uint32_t> order_;       // 0, 1, 2, ... between rows
  std::vector<std::uint32_t> others_;      // places of order_ that are to be restored
  std::vector<std::uint64_t> masked_;      // one bit a position, and a word more for SetBits
};

template <bool kTwo>
void Mixer::ReadRange(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold,
                      Rows out) const {
  constexpr std::uint64_t kLine = 64 / sizeof(std::uint32_t);
  Scratch scratch(*this);
  std::uint64_t first[kRowsPerChunk];
  const PieceTable::Record* const records = table_.records_.data();
  const auto End = [&](std::uint64_t begin) {
    return std::min<std::uint64_t>(begin + options_.stride, stream_size_);
  };
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t chunk = std::min(kRowsPerChunk, count - done);
    Starts(start + done, chunk, first);
    for (std::uint64_t i = 0; i < chunk; ++i, ++done) {
      // Rows start anywhere in the stream and words anywhere in the table: memory is asked for both
      // before they are needed, the stream's words two rows ahead because the table's places are
      // read there one row ahead. (In functions of their own, gcc would drop these loops as without
      // effect.)
      if (i + 2 < chunk) {
        for (std::uint64_t j = first[i + 2], end = End(j); j < end; j += kLine) {
          __builtin_prefetch(stream_ + j);
        }
      }
      if (i + 1 < chunk) {
        for (std::uint64_t j = first[i + 1], end = End(j); j < end; ++j) {
          __builtin_prefetch(records + (std::size_t{stream_[j]} << kTwo));
        }
      }
      scratch.Make<kTwo>(start + done, first[i], student_threshold, done, out);
    }
  }
}

void Mixer::Read(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold,
                 int threads, Rows out) const {
  const std::uint64_t T = options_.T, M = options_.capacity;
  const std::uint64_t parts = std::clamp<std::uint64_t>(
      count / kRowsPerThread, 1, static_cast<std::uint64_t>(std::max(threads, 1)));
  ShareRanges(count, parts, threads, [&](std::uint64_t first, std::uint64_t last, std::size_t) {
    const Rows part = {out.input_ids + first * T, out.token_type_ids + first * T,
                       out.masked_positions + first * M, out.labels + first * M};
    if (table_.sides() == 2) {
      ReadRange<true>(start + first, last - first, student_threshold, part);
    } else {
      ReadRange<false>(start + first, last - first, student_threshold, part);
    }
  });
}

}  // namespace mvbert
