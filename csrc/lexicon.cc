#include "lexicon.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace mvbert {

namespace {

constexpr int kFirstBits = 12;

std::uint64_t Load(const char* bytes, std::size_t size) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes, size);
  return value;
}

// The first eight bytes as a number that compares as the bytes do.
std::uint64_t Prefix(std::string_view word) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    value = value << 8 | (i < word.size() ? static_cast<unsigned char>(word[i]) : 0u);
  }
  return value;
}

[[noreturn]] void ThrowOutside(std::uint32_t id, std::size_t size) {
  throw std::invalid_argument("word id " + std::to_string(id) +
                              " of the stream lies outside the lexicon of " + std::to_string(size));
}

}  // namespace

std::string_view CutWord(std::string_view word) {
  if (word.size() <= kMaxStoredCodePoints) return word;
  std::size_t code_points = 0;
  for (std::size_t i = 0; i < word.size(); ++i) {
    const bool starts = (static_cast<unsigned char>(word[i]) & 0xC0) != 0x80;
    if (starts && code_points++ == kMaxStoredCodePoints) return word.substr(0, i);
  }
  return word;
}

std::uint64_t HashWord(std::string_view word) {
  const char* at = word.data();
  std::size_t left = word.size();
  std::uint64_t state = internal::kOdd1 ^ left;
  while (left > 16) {
    state = internal::Fold(Load(at, 8) ^ internal::kOdd0, Load(at + 8, 8) ^ state);
    at += 16;
    left -= 16;
  }
  const std::uint64_t low = Load(at, std::min<std::size_t>(left, 8));
  const std::uint64_t high = left > 8 ? Load(at + 8, left - 8) : 0;
  return internal::Fold(low ^ internal::kOdd0, high ^ state) * internal::kOdd0;
}

Lexicon::Lexicon()
    : ends_(1, 0),
      counts_(1, 0),
      slots_(std::size_t{1} << kFirstBits, Slot{0, 0}),
      shift_(64 - kFirstBits) {}

void Lexicon::Prefetch(std::uint64_t hash) const { __builtin_prefetch(&slots_[hash >> shift_]); }

std::uint32_t Lexicon::Intern(std::string_view word, std::uint64_t hash) {
  const std::size_t mask = slots_.size() - 1;
  const auto tag = static_cast<std::uint32_t>(hash);
  std::size_t at = hash >> shift_;
  for (; slots_[at].id != 0; at = (at + 1) & mask) {
    if (slots_[at].tag == tag && this->word(slots_[at].id) == word) return slots_[at].id;
  }
  if (ends_.size() >= std::numeric_limits<std::uint32_t>::max() - 1) {
    throw std::length_error(
        "the text has more than 4,294,967,293 distinct words, which word ids of 32 bits cannot "
        "number; build several corpora");
  }
  const auto id = static_cast<std::uint32_t>(ends_.size());
  bytes_.append(word);
  ends_.push_back(bytes_.size());
  counts_.push_back(0);
  slots_[at] = Slot{id, tag};
  if (ends_.size() * 2 > slots_.size()) Grow();
  return id;
}

void Lexicon::Grow() {
  // Doubling; hashes are made again from the bytes, which is one walk in memory order.
  std::vector<Slot> slots(slots_.size() * 2, Slot{0, 0});
  --shift_;
  const std::size_t mask = slots.size() - 1;
  for (std::uint32_t id = 1; id < ends_.size(); ++id) {
    const std::uint64_t hash = HashWord(word(id));
    std::size_t at = hash >> shift_;
    while (slots[at].id != 0) at = (at + 1) & mask;
    slots[at] = Slot{id, static_cast<std::uint32_t>(hash)};
  }
  slots_.swap(slots);
}

void Lexicon::CountStream(const std::uint32_t* ids, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    if (ids[i] >= counts_.size()) ThrowOutside(ids[i], counts_.size());
    ++counts_[ids[i]];
  }
}

void Lexicon::UncountStream(const std::uint32_t* ids, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    if (ids[i] >= counts_.size()) ThrowOutside(ids[i], counts_.size());
    if (counts_[ids[i]] == 0) {
      throw std::invalid_argument("word id " + std::to_string(ids[i]) +
                                  " occurs more often in the stream than it was counted");
    }
    --counts_[ids[i]];
  }
}

std::string Lexicon::Lines(std::uint32_t first) const {
  std::string lines;
  for (std::uint32_t id = first; id < size(); ++id) lines.append(word(id)).push_back('\n');
  return lines;
}

std::vector<std::uint32_t> Lexicon::Order() const {
  // Equal counts are the rule (half of the words of a text come once), so the first bytes travel
  // with the count and most comparisons touch no other memory.
  struct Entry {
    std::uint64_t count;
    std::uint64_t prefix;
    std::uint32_t id;
  };
  std::vector<Entry> entries;
  entries.reserve(size());
  for (std::uint32_t id = 1; id < size(); ++id) {
    entries.push_back({counts_[id], Prefix(word(id)), id});
  }
  std::sort(entries.begin(), entries.end(), [this](const Entry& a, const Entry& b) {
    if (a.count != b.count) return a.count > b.count;
    if (a.prefix != b.prefix) return a.prefix < b.prefix;
    return word(a.id) < word(b.id);
  });
  std::vector<std::uint32_t> order;
  order.reserve(size());
  order.push_back(kDocumentMark);
  for (const Entry& entry : entries) order.push_back(entry.id);
  return order;
}

FinalLexicon::FinalLexicon(const Lexicon& lexicon) : final_ids(lexicon.size()) {
  const std::vector<std::uint32_t> order = lexicon.Order();
  ends.reserve(order.size());
  counts.reserve(order.size());
  for (std::uint32_t i = 0; i < order.size(); ++i) {
    const std::string_view word = lexicon.word(order[i]);
    bytes.insert(bytes.end(), word.begin(), word.end());
    ends.push_back(bytes.size());
    counts.push_back(lexicon.count(order[i]));
    final_ids[order[i]] = i;
  }
}

}  // namespace mvbert
