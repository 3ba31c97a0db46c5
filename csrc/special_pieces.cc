#include "special_pieces.h"

#include <algorithm>
#include <stdexcept>

#include "unicode.h"

namespace mvbert {

SpecialPieces::SpecialPieces(const std::vector<SpecialPiece>& pieces, const WordSplitter& splitter,
                             std::size_t vocabulary_size)
    : options_(splitter.options()) {
  std::vector<std::pair<std::string, std::int32_t>> normalized;
  for (const auto& [piece, id, is_normalized] : pieces) {
    if (piece.empty() || piece.find_first_of(" \t\r\n") != std::string::npos) {
      throw std::invalid_argument("a special piece must have letters and no space, got '" + piece +
                                  "'");
    }
    if (id < 0 || static_cast<std::size_t>(id) >= vocabulary_size) {
      throw std::invalid_argument("special piece '" + piece + "' has id " + std::to_string(id) +
                                  ", outside the vocabulary");
    }
    std::string text = piece;
    if (is_normalized) {
      Words words;
      splitter.Split(piece, &words);
      text = words.bytes;
      if (text.empty()) continue;  // it is made of what is deleted: no text has it
    }
    auto& same_kind = is_normalized ? normalized : written_;
    const auto is_same = [&text](const auto& other) { return other.first == text; };
    if (std::none_of(same_kind.begin(), same_kind.end(), is_same)) same_kind.emplace_back(text, id);
  }
  for (const auto& [piece, id] : written_) {
    if (first_bytes_.find(piece[0]) == std::string::npos) first_bytes_ += piece[0];
  }
  for (const auto& [piece, id] : normalized) {
    const auto first = static_cast<unsigned char>(piece[0]);
    first_normalized_[first] = true;
    if (first >= 'a' && first <= 'z') first_normalized_[first - 32] = true;
    for (std::size_t byte = 0xC2; byte < 0xF5; ++byte) first_normalized_[byte] = true;
  }
  has_normalized_ = !normalized.empty();
  trie_ = PieceTrie({written_.begin(), written_.end()});
  normalized_ = PieceTrie({normalized.begin(), normalized.end()});
}

std::size_t SpecialPieces::CleanedEndAt(std::string_view text, std::size_t begin, std::size_t at,
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
  for (const auto& [piece, special_id] : written_) {
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
      if (p == end || EndAt(text, static_cast<std::size_t>(p - text.data()), &next) != 0) break;
      const CharKind kind = KindOf(EntryOf<Casing::kCased>(DecodeUtf8(&p)));
      if (separates(kind)) break;
      if (kind != kDrop) return 0;
    }
    *id = special_id;
    return after;
  }
  return 0;
}

std::size_t SpecialPieces::NormalizedEndAt(std::string_view text, std::size_t at,
                                           std::int32_t* id) const {
  const auto entry_of = [this](char32_t code) {
    if (!options_.lowercase) return EntryOf<Casing::kCased>(code);
    return options_.strip_accents ? EntryOf<Casing::kUncased>(code)
                                  : EntryOf<Casing::kAccented>(code);
  };
  const char* const end = text.data() + text.size();
  const char* p = text.data() + at;
  std::size_t longest = 0;
  std::uint32_t node = PieceTrie::kRoot;
  const auto step = [&](std::string_view bytes) {
    for (const char byte : bytes) {
      node = normalized_.Step(node, byte);
      if (node == 0) return false;
    }
    return true;
  };
  while (p < end) {
    const char* const start = p;
    const char32_t code = DecodeUtf8(&p);
    const CharEntry entry = entry_of(code);
    const CharKind kind = KindOf(entry);
    if (kind == kDrop || kind == kMark) {
      if (node == PieceTrie::kRoot) break;  // it belongs to what stands before
      continue;
    }
    bool goes_on = true;
    if (kind == kMapLetters || kind == kMapPunct || kind == kMapCjk) {
      goes_on = step(Replacement(entry));
    } else if (kind == kHangul) {
      std::vector<SourceChar> letters;
      Decompose({code, 0, 1}, &letters);
      for (const SourceChar& letter : letters) {
        char utf8[4];
        goes_on =
            goes_on && step({utf8, static_cast<std::size_t>(EncodeUtf8(letter.code, utf8) - utf8)});
      }
    } else {
      goes_on = step({start, static_cast<std::size_t>(p - start)});
    }
    if (!goes_on) break;
    if (normalized_.id(node) >= 0) {
      longest = static_cast<std::size_t>(p - text.data());
      *id = normalized_.id(node);
    }
  }
  return longest;
}

}  // namespace mvbert
