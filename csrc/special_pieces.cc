#include "special_pieces.h"

#include <stdexcept>

#include "unicode.h"

namespace mvbert {

SpecialPieces::SpecialPieces(std::vector<std::pair<std::string, std::int32_t>> pieces, bool cleaned)
    : pieces_(std::move(pieces)), cleaned_(cleaned) {
  std::vector<std::pair<std::string_view, std::int32_t>> keys;
  for (const auto& [piece, id] : pieces_) {
    if (piece.empty() || piece.find_first_of(" \t\r\n") != std::string::npos) {
      throw std::invalid_argument("a special piece must have letters and no space, got '" + piece +
                                  "'");
    }
    keys.emplace_back(piece, id);
    if (first_bytes_.find(piece[0]) == std::string::npos) first_bytes_ += piece[0];
  }
  trie_ = PieceTrie(std::move(keys));
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
    const CharKind kind = KindOf(EntryOf<false>(DecodeUtf8(&p)));
    if (separates(kind)) break;
    if (kind != kDrop) return 0;
  }
  const char* const end = text.data() + text.size();
  std::vector<SourceChar> composed;
  for (const auto& [piece, special_id] : pieces_) {
    const char* p = text.data() + at;
    std::size_t same = 0;
    while (p < end && same < piece.size()) {
      const char32_t code = DecodeUtf8(&p);
      if (KindOf(EntryOf<false>(code)) == kDrop) continue;
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
      const CharKind kind = KindOf(EntryOf<false>(DecodeUtf8(&p)));
      if (separates(kind)) break;
      if (kind != kDrop) return 0;
    }
    *id = special_id;
    return after;
  }
  return 0;
}

}  // namespace mvbert
