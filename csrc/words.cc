#include "words.h"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "unicode.h"

namespace mvbert {

void WordBatch::Clear() {
  if (open_) {
    const std::size_t start = starts_[word_count_];
    std::memmove(bytes_.data(), bytes_.data() + start, byte_count_ - start);
    if (track_) {
      std::memmove(sources_.data(), sources_.data() + start,
                   (byte_count_ - start) * sizeof(std::uint32_t));
    }
    byte_count_ -= start;
    starts_[0] = 0;
  } else {
    byte_count_ = 0;
    reordered_ = false;
  }
  word_count_ = 0;
}

void WordBatch::Reserve(std::size_t more) {
  // (Apart from the bytes: one word of a gigabyte is one word.)
  const std::size_t words = word_count_ + more + kPadding;
  if (words > ends_.size()) {
    starts_.resize(words + words / 2 + kTarget);
    ends_.resize(starts_.size());
  }
  const std::size_t need = byte_count_ + more + kPadding;
  if (need <= bytes_.size() && (!track_ || need <= sources_.size())) return;
  if (need > std::numeric_limits<std::uint32_t>::max()) {
    throw std::length_error("a single word of 4 GiB");
  }
  const std::size_t size = need + need / 2 + kTarget;
  bytes_.resize(size);
  if (track_) sources_.resize(size);
}

// One call of WordSplitter::Fill: the cursor in the text and the code-point-wise path.
template <Casing kCasing, bool kTrack>
class Filler {
 public:
  Filler(std::string_view text, std::size_t from, AsciiRunFunction ascii_run, WordBatch* batch,
         std::size_t most)
      : begin_(text.data()),
        at_(begin_ + from),
        end_(begin_ + text.size()),
        ascii_run_(ascii_run),
        batch_(*batch),
        target_(std::min(batch->closed_bytes() + most, batch->target())) {}

  // Every turn reads a code point at least, and the first is made even if the batch is full.
  std::size_t Run() {
    const char* const from = at_;
    while (at_ < end_ && (at_ == from || !Done())) {
      if (AsciiAhead()) {
        ReadAscii();
        if (at_ == end_ || (at_ != from && Done())) break;
      }
      // One code point at a time while there are others than ASCII about.
      batch_.Reserve(kStep);
      Step();
    }
    if (at_ == end_) Close();
    return static_cast<std::size_t>(at_ - begin_);
  }

 private:
  static constexpr std::size_t kStep = 256;  // more bytes and words than a code point adds

  bool Done() const { return batch_.closed_bytes() >= target_; }

  // Worth calling ReadAscii for: the next 16 bytes, or the last ones, look plain.
  bool AsciiAhead() const {
    if (static_cast<signed char>(*at_) < 0) return false;
    if (end_ - at_ < 16) return true;
    std::uint64_t bytes[2];
    std::memcpy(bytes, at_, 16);
    return ((bytes[0] | bytes[1]) & 0x8080808080808080u) == 0;
  }

  void ReadAscii() {
    // (A word longer than the rest is read on in steps of this size.)
    constexpr std::size_t kAtLeast = 256;
    const std::size_t closed = batch_.closed_bytes();
    const std::size_t limit = closed < target_ ? std::max(target_ - closed, kAtLeast) : kAtLeast;
    batch_.Reserve(limit + 256);
    std::uint32_t* starts = batch_.starts_.data();
    AsciiRun run;
    run.at = at_;
    run.end = end_;
    run.bytes = batch_.bytes_.data() + batch_.byte_count_;
    run.offset = static_cast<std::uint32_t>(batch_.byte_count_);
    run.limit = static_cast<std::uint32_t>(limit);
    run.starts = starts + batch_.word_count_ + (batch_.open_ ? 1 : 0);
    run.ends = batch_.ends_.data() + batch_.word_count_;
    run.open = batch_.open_;
    ascii_run_(&run);
    at_ = run.at;
    if (kTrack) {  // text is copied whole, a byte for a byte
      std::uint32_t* const sources = batch_.sources_.data() + batch_.byte_count_;
      const std::uint32_t first = batch_.source_at_;
      const auto count = static_cast<std::uint32_t>(run.offset - batch_.byte_count_);
      for (std::uint32_t i = 0; i < count; ++i) sources[i] = first + i;
      batch_.source_at_ += count;
    }
    batch_.byte_count_ = run.offset;
    batch_.word_count_ = static_cast<std::size_t>(run.ends - batch_.ends_.data());
    batch_.open_ = run.open;
  }

  void Close() {
    if (!batch_.open_) return;
    batch_.ends_[batch_.word_count_++] = static_cast<std::uint32_t>(batch_.byte_count_);
    batch_.open_ = false;
  }

  void Open() {
    if (batch_.open_) return;
    batch_.starts_[batch_.word_count_] = static_cast<std::uint32_t>(batch_.byte_count_);
    batch_.open_ = true;
  }

  void Copy(const char* s, std::size_t n) {
    if (kTrack) {
      for (std::size_t i = 0; i < n; ++i) batch_.sources_[batch_.byte_count_ + i] = source_begin_;
      if (n > 0) batch_.sources_[batch_.byte_count_ + n - 1] = source_end_ - 1;
    }
    std::memcpy(batch_.bytes_.data() + batch_.byte_count_, s, n);
    batch_.byte_count_ += n;
  }

  void Letters(std::string_view s) {
    Open();
    Copy(s.data(), s.size());
  }

  void Alone(std::string_view s) {
    Close();
    Letters(s);
    Close();
  }

  // A code point of normalised text: a punctuation mark or a letter.
  void Normalized(const SourceChar& c) {
    char utf8[4];
    const std::string_view s(utf8, static_cast<std::size_t>(EncodeUtf8(c.code, utf8) - utf8));
    source_begin_ = c.begin;
    source_end_ = c.end;
    if (KindOf(EntryOf<kCasing>(c.code)) == kPunct) {
      Alone(s);
    } else {
      Letters(s);
    }
  }

  // Reads the code point at the cursor.
  SourceChar Next() {
    const std::uint32_t at = batch_.source_at_++;
    return {DecodeUtf8(&at_), at, at + 1};
  }

  // Undoes the last Next().
  void Back(const char* start) {
    at_ = start;
    --batch_.source_at_;
  }

  void Step() {
    const char* start = at_;
    const SourceChar c = Next();
    source_begin_ = c.begin;
    source_end_ = c.end;
    const CharEntry entry = EntryOf<kCasing>(c.code);
    const CharKind kind = KindOf(entry);
    if (kCasing != Casing::kUncased && (kind == kLetter || kind == kPunct || kind == kMapLetters) &&
        GatherFollows()) {
      Back(start);
      GatherComposed();
      return;
    }
    const std::string_view source(start, static_cast<std::size_t>(at_ - start));
    switch (kind) {
      case kLetter:
        Letters(source);
        break;
      case kDrop:
        break;
      case kMark:
        break;
      case kSpace:
        Close();
        break;
      case kPunct:
        Alone(source);
        break;
      case kCjk:
        Alone(source);
        break;
      case kMapLetters:
        Letters(Replacement(entry));
        break;
      case kMapPunct:
        Alone(Replacement(entry));
        break;
      case kMapCjk:
        Alone(Replacement(entry));
        break;
      case kHangul: {
        gathered_.clear();
        Decompose(c, &gathered_);
        for (const SourceChar& letter : gathered_) Normalized(letter);
        break;
      }
      case kGather:
        Back(start);
        if (kCasing == Casing::kUncased) {
          GatherUncased();
        } else {
          GatherComposed();
        }
        break;
    }
  }

  // With accents: does a code point that composition may touch come next, deleted ones aside?
  bool GatherFollows() const {
    const char* p = at_;
    while (p < end_) {
      if (static_cast<unsigned char>(*p) - 0x20u < 0x5F) return false;  // printable ASCII
      const CharKind kind = KindOf(EntryOf<kCasing>(DecodeUtf8(&p)));
      if (kind != kDrop) return kind == kGather;
    }
    return false;
  }

  // With accents: composes the code point at the cursor and all that follow and may combine (NFC).
  void GatherComposed() {
    gathered_.clear();
    while (at_ < end_) {
      const char* start = at_;
      const SourceChar c = Next();
      const CharEntry entry = EntryOf<kCasing>(c.code);
      const CharKind kind = KindOf(entry);
      if (kind == kDrop) continue;
      if (kind != kGather && !gathered_.empty()) {
        Back(start);
        break;
      }
      if (kind != kMapLetters) {
        Decompose(c, &gathered_);
        continue;
      }
      const std::string_view lowered = Replacement(entry);
      for (const char* p = lowered.data(); p < lowered.data() + lowered.size();) {
        Decompose({DecodeUtf8(&p), c.begin, c.end}, &gathered_);
      }
    }
    CanonicalOrder(&gathered_);
    Compose(&gathered_);
    AppendGathered();
  }

  // Uncased: brings combining characters that are not accents into canonical order.
  void GatherUncased() {
    gathered_.clear();
    while (at_ < end_) {
      const char* start = at_;
      const SourceChar c = Next();
      const CharKind kind = KindOf(EntryOf<Casing::kUncased>(c.code));
      if (kind == kDrop) continue;
      const std::size_t before = gathered_.size();
      if (kind == kGather || kind == kMark) Decompose(c, &gathered_);
      // Nothing moves past a starter. (U+0F73 is one by its class, but not what it decomposes to.)
      if (kind != kGather && (kind != kMark || CombiningClass(gathered_[before].code) == 0)) {
        gathered_.resize(before);
        Back(start);
        break;
      }
    }
    CanonicalOrder(&gathered_);
    AppendGathered();
  }

  void AppendGathered() {
    // (Room is made in steps: a run of a million marks may leave nothing.)
    std::size_t room = 0;
    if (gathered_.size() > 1) batch_.reordered_ = true;
    for (const SourceChar& c : gathered_) {
      if (kCasing == Casing::kUncased && IsNonspacingMark(c.code)) continue;
      if (room == 0) {
        batch_.Reserve(kStep);
        room = kStep / 4;
      }
      Normalized(c);
      --room;
    }
  }

  const char* begin_;
  const char* at_;
  const char* end_;
  AsciiRunFunction ascii_run_;
  WordBatch& batch_;
  const std::size_t target_;        // bytes of complete words
  std::uint32_t source_begin_ = 0;  // of what is copied next
  std::uint32_t source_end_ = 0;
  std::vector<SourceChar> gathered_;
};

std::size_t WordSplitter::Fill(std::string_view utf8, std::size_t from, WordBatch* batch,
                               std::size_t most) const {
  batch->Reserve(256);
  const bool track = batch->track_;
  const auto fill = [&](auto casing, AsciiRunFunction ascii) {
    return track ? Filler<casing(), true>(utf8, from, ascii, batch, most).Run()
                 : Filler<casing(), false>(utf8, from, ascii, batch, most).Run();
  };
  if (!options_.lowercase) {
    return fill(std::integral_constant<Casing, Casing::kCased>(), ascii_.cased);
  }
  if (!options_.strip_accents) {
    return fill(std::integral_constant<Casing, Casing::kAccented>(), ascii_.accented);
  }
  return fill(std::integral_constant<Casing, Casing::kUncased>(), ascii_.uncased);
}

void WordSplitter::Split(std::string_view utf8, Words* out) const {
  CheckUtf8(utf8);
  WordBatch batch;
  ForEachWord(utf8, &batch, [out](std::string_view word) {
    out->bytes.append(word);
    if (out->bytes.size() > std::numeric_limits<std::uint32_t>::max()) {
      throw std::length_error("more than 4 GiB of words in one Words");
    }
    out->ends.push_back(static_cast<std::uint32_t>(out->bytes.size()));
  });
}

}  // namespace mvbert
