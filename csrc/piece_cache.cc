#include "piece_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "lexicon.h"

namespace mvbert {

PieceCache::PieceCache(const WordPiece& teacher, const WordPiece* student)
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

PieceCache::PieceCache(const PieceCache& seeds)
    : teacher_(seeds.teacher_),
      student_(seeds.student_),
      narrow_(seeds.narrow_),
      pool_(seeds.pool_),
      sets_(kSets) {
  sets_.CopyFrom(seeds.sets_);
}

void PieceCache::Look(const WordBatch& batch, const std::uint8_t* choices,
                      const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
                      std::vector<std::uint64_t>* ends, std::uint32_t* starts) {
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

std::size_t PieceCache::SetOf(std::uint64_t low, std::uint64_t high, std::size_t size) {
  return HashShortWord(low, high, size) >> (64 - kBits);
}

PieceCache::Slot* PieceCache::Find(Set& set, std::uint64_t low, std::uint64_t high) {
  for (Slot& slot : set.slots) {
    if (slot.low == low && slot.high == high) return &slot;
  }
  return nullptr;
}

template <typename Format, bool kMixed>
void PieceCache::LookUp(const WordBatch& batch, const std::uint8_t* choices,
                        const std::vector<std::uint32_t>& text_ends, IdBuffer* ids,
                        std::vector<std::uint64_t>* ends, std::uint32_t* word_starts) {
  // Two passes over 64 words at a time: the first finds their places and asks for the memory, so
  // that the second need not wait for it.
  constexpr std::size_t kGroup = 64;
  std::uint64_t lows[kGroup], highs[kGroup];
  std::uint32_t places[kGroup];
  Set* const sets = &sets_[0];  // in a register: a store to *ids might change a member
  const std::size_t count = batch.size();
  auto text_end = text_ends.begin();
  for (std::size_t first = 0; first < count; first += kGroup) {
    const std::size_t n = std::min(kGroup, count - first);
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint32_t start = batch.start(first + i);
      const std::uint32_t size = batch.end(first + i) - start;
      ShortWord(batch.bytes() + start, std::min<std::uint32_t>(size, 16), &lows[i], &highs[i]);
      const std::size_t place = SetOf(lows[i], highs[i], size);
      __builtin_prefetch(&sets[place]);
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
          const Set& set = sets[places[i]];
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

Pieces PieceCache::Pack(const std::int32_t* cut, std::size_t count) {
  bool fits = count <= (narrow_ ? Narrow::kMost : Wide::kMost);
  for (std::size_t i = 0; fits && i < count; ++i) {
    fits = static_cast<std::uint64_t>(cut[i]) < (narrow_ ? Narrow::kLimit : Wide::kLimit);
  }
  if (fits) return narrow_ ? Narrow::Pack(cut, count) : Wide::Pack(cut, count);
  if (count >= kMostInPool) throw std::length_error("a word has 2^16 pieces or more");
  const std::size_t offset = pool_.size();
  pool_.insert(pool_.end(), cut, cut + count);
  pool_.resize((pool_.size() + kStride - 1) / kStride * kStride);  // for reading them at once
  return narrow_ ? Narrow::Place(offset, count) : Wide::Place(offset, count);
}

Pieces PieceCache::Cut(const WordPiece& vocabulary, std::string_view word, std::int32_t base) {
  cut_.clear();
  vocabulary.Cut(word, &cut_);
  for (std::int32_t& id : cut_) id += base;
  return Pack(cut_.data(), cut_.size());
}

void PieceCache::CutBoth(std::string_view word, Pieces pieces[2]) {
  pieces[0] = Cut(teacher_, word, 0);
  pieces[1] =
      student_ == nullptr ? 0 : Cut(*student_, word, static_cast<std::int32_t>(teacher_.size()));
}

__attribute__((noinline)) const PieceCache::Slot* PieceCache::Further(std::uint32_t place,
                                                                      std::uint64_t low,
                                                                      std::uint64_t high,
                                                                      std::string_view word) {
  Set& set = sets_[place];
  for (std::size_t way = 2; way < kWays; ++way) {
    if (set.slots[way].low != low || set.slots[way].high != high) continue;
    std::swap(set.slots[way], set.slots[1]);
    return &set.slots[1];
  }
  return Insert(&set, low, high, word);
}

PieceCache::Slot* PieceCache::Insert(Set* set, std::uint64_t low, std::uint64_t high,
                                     std::string_view word) {
  std::size_t way = 0;
  while (way < kWays && set->slots[way].low != 0) ++way;
  if (way == kWays) way = 2 + (next_victim_++ & 1);
  Slot* slot = &set->slots[way];
  CutBoth(word, slot->pieces);
  slot->low = low;
  slot->high = high;
  return slot;
}

Pieces PieceCache::LongWord(std::string_view word, std::size_t which) {
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

}  // namespace mvbert
