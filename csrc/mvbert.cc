#include "mvbert.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "build_info.h"
#include "token_rows.h"
#include "tokenizer.h"
#include "unicode.h"
#include "wordpiece.h"

struct mvbert_tokenizer {
  std::vector<std::string> pieces;   // of all ids; blank ones stand for nothing
  std::vector<std::int32_t> sorted;  // ids of pieces that are not blank, by their bytes
  std::shared_ptr<const mvbert::WordPiece> words;
  std::unique_ptr<const mvbert::Tokenizer> tokenizer;
  std::int32_t cls = 0, sep = 0, pad = 0;

  std::int32_t Id(std::string_view piece) const {
    const auto place = std::lower_bound(sorted.begin(), sorted.end(), piece,
                                        [this](std::int32_t id, std::string_view wanted) {
                                          return pieces[static_cast<std::size_t>(id)] < wanted;
                                        });
    if (place == sorted.end() || pieces[static_cast<std::size_t>(*place)] != piece) return -1;
    return *place;
  }
};

namespace mvbert {
namespace {

// ---- errors ----------------------------------------------------------------------------------

thread_local std::string last_message;
thread_local const char* last_error = "";  // last_message, or a constant where memory is short

int Fail(mvbert_status status, std::string message) {
  last_message = std::move(message);
  last_error = last_message.c_str();
  return status;
}

// An error with its status, for code that does not return one.
struct Failure {
  mvbert_status status;
  std::string message;
};

[[noreturn]] void Throw(mvbert_status status, std::string message) {
  throw Failure{status, std::move(message)};
}

// The result of call(), or the status of what it throws; what the core refuses is `refused`.
template <typename Call>
auto Guarded(mvbert_status refused, Call&& call) -> decltype(call()) {
  try {
    try {
      return call();
    } catch (Failure& failure) {
      return Fail(failure.status, std::move(failure.message));
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::logic_error& error) {  // std::invalid_argument, std::length_error
      return Fail(refused, error.what());
    } catch (const std::exception& error) {
      return Fail(MVBERT_ERROR_INTERNAL, error.what());
    }
  } catch (...) {
    last_error = "out of memory";
    return MVBERT_ERROR_MEMORY;
  }
}

void Require(bool good, const char* message) {
  if (!good) Throw(MVBERT_ERROR_ARGUMENT, message);
}

template <std::size_t kCount>
void RequireZero(const std::int32_t (&reserved)[kCount]) {
  for (const std::int32_t value : reserved) {
    Require(value == 0, "a reserved field of the options is not zero: was the structure zeroed?");
  }
}

std::string_view Text(const char* data, std::size_t size) {
  Require(data != nullptr || size == 0, "the text is a null pointer");
  return {data == nullptr ? "" : data, size};
}

void RequireUtf8(std::string_view text, const std::string& what) {
  const std::size_t at = Utf8ErrorOffset(text);
  if (at == kNoError) return;
  char place[64];
  std::snprintf(place, sizeof place, "byte 0x%02x at offset %llu",
                static_cast<unsigned>(static_cast<unsigned char>(text[at])),
                static_cast<unsigned long long>(at));
  Throw(MVBERT_ERROR_TEXT, what + " is not UTF-8: " + place);
}

// ---- the vocabulary --------------------------------------------------------------------------

constexpr const char* kExpected = "; expected a vocab.txt: UTF-8 text, one piece per line";
constexpr const char* kSpecial[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]",
                                    "[MASK]"};  // last: optional

std::string ReadFile(const char* path) {
  const auto fail = [path](int error) {
    Throw(MVBERT_ERROR_FILE, std::string("cannot read ") + path + ": " + std::strerror(error));
  };
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), &std::fclose);
  if (file == nullptr) fail(errno);
  std::string data;
  char part[16384];
  while (const std::size_t size = std::fread(part, 1, sizeof part, file.get())) {
    data.append(part, size);
  }
  if (std::ferror(file.get()) != 0) fail(errno);
  return data;
}

// The lines of a vocab.txt; lines end with \n, \r\n or \r.
std::vector<std::string> Lines(std::string_view vocab, const std::string& name) {
  const auto fail = [&name](const std::string& what) {
    Throw(MVBERT_ERROR_VOCAB, name + what + kExpected);
  };
  if (vocab.empty()) fail(" is empty");
  const std::size_t nul = vocab.find('\0');
  if (nul != std::string_view::npos) fail(" is binary (NUL at byte " + std::to_string(nul) + ")");
  if (vocab.substr(0, 3) == "\xEF\xBB\xBF") fail(" begins with a byte order mark");
  const std::size_t error = Utf8ErrorOffset(vocab);
  if (error != kNoError) fail(" is not UTF-8 (at byte " + std::to_string(error) + ")");
  std::vector<std::string> lines;
  while (!vocab.empty()) {
    const std::size_t end = std::min(vocab.find_first_of("\r\n"), vocab.size());
    lines.emplace_back(vocab.substr(0, end));
    const bool two = vocab.substr(end, 2) == "\r\n";
    vocab.remove_prefix(std::min(end + (two ? 2 : 1), vocab.size()));
  }
  return lines;
}

bool HasSpace(std::string_view text) {
  for (const char* p = text.data(); p < text.data() + text.size();) {
    if (KindOf(EntryOf<Casing::kCased>(DecodeUtf8(&p))) == kSpace) return true;
  }
  return false;
}

// Puts added pieces that the vocabulary has not after its end, in the order of their ids.
void AppendAdded(const mvbert_options& options, std::vector<std::string>* pieces) {
  const std::size_t base = pieces->size();
  for (std::size_t i = 0; i < options.added_count; ++i) {
    const auto& [text, id, normalized] = options.added[i];
    Require(text != nullptr, "an added piece is a null pointer");
    const std::string piece = text, name = "added piece '" + piece + "'";
    RequireUtf8(piece, name);
    if (piece.empty() || HasSpace(piece)) {
      Throw(MVBERT_ERROR_VOCAB, name + " is empty or has white space in it");
    }
    if (id < 0 || static_cast<std::size_t>(id) >= base + options.added_count) {
      Throw(MVBERT_ERROR_VOCAB, name + " has id " + std::to_string(id) +
                                    ", which is neither in the vocabulary of " +
                                    std::to_string(base) + " pieces nor next after it");
    }
    const auto place = static_cast<std::size_t>(id);
    if (place >= pieces->size()) pieces->resize(place + 1);
    std::string& there = (*pieces)[place];
    if (place >= base && there.empty()) there = piece;
    if (there != piece) {
      Throw(MVBERT_ERROR_VOCAB, name + " has id " + std::to_string(id) +
                                    ", which is that of the piece '" + there + "'");
    }
  }
  for (std::size_t id = base; id < pieces->size(); ++id) {
    if ((*pieces)[id].empty()) {
      Throw(MVBERT_ERROR_VOCAB,
            "no added piece has id " + std::to_string(id) + ", and one has a greater id");
    }
  }
}

// Sorts ids by their pieces; throws where two are the same.
std::vector<std::int32_t> Sorted(const std::vector<std::string>& pieces, const std::string& name) {
  const auto piece = [&pieces](std::int32_t id) -> const std::string& {
    return pieces[static_cast<std::size_t>(id)];
  };
  std::vector<std::int32_t> ids;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    if (!pieces[id].empty()) ids.push_back(static_cast<std::int32_t>(id));
  }
  std::sort(ids.begin(), ids.end(), [&](std::int32_t a, std::int32_t b) {
    const int order = piece(a).compare(piece(b));
    return order != 0 ? order < 0 : a < b;
  });
  const auto twice = std::adjacent_find(ids.begin(), ids.end(),
                                        [&](auto a, auto b) { return piece(a) == piece(b); });
  if (twice != ids.end()) {
    Throw(MVBERT_ERROR_VOCAB, name + ": piece '" + piece(*twice) + "' appears twice, with ids " +
                                  std::to_string(twice[0]) + " and " + std::to_string(twice[1]));
  }
  return ids;
}

std::unique_ptr<mvbert_tokenizer> Make(std::string_view vocab, const std::string& name,
                                       const mvbert_options* given) {
  const mvbert_options options = given == nullptr ? mvbert_options{} : *given;
  RequireZero(options.reserved);
  Require(options.added != nullptr || options.added_count == 0,
          "the added pieces are a null pointer");
  auto made = std::make_unique<mvbert_tokenizer>();
  std::vector<std::string>& pieces = made->pieces;
  pieces = Lines(vocab, name);
  if (pieces.size() + options.added_count >
      static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    Throw(MVBERT_ERROR_VOCAB, name + " has more than 2^31 - 1 pieces");
  }
  std::vector<std::string> of_words = pieces;  // words are never cut into pieces after these
  AppendAdded(options, &pieces);
  of_words.resize(pieces.size());
  made->sorted = Sorted(pieces, name);
  std::vector<SpecialPiece> special;
  std::string missing;
  for (const char* piece : kSpecial) {
    const std::int32_t id = made->Id(piece);
    if (id >= 0) {
      special.push_back({piece, id, false});
    } else if (piece != kSpecial[4]) {
      missing += (missing.empty() ? "" : ", ") + std::string(piece);
    }
  }
  if (!missing.empty()) Throw(MVBERT_ERROR_VOCAB, name + " has no " + missing + kExpected);
  for (std::size_t i = 0; i < options.added_count; ++i) {
    const mvbert_added_piece& added = options.added[i];
    special.push_back({added.piece, added.id, added.normalized != 0});
  }
  made->pad = made->Id("[PAD]");
  made->cls = made->Id("[CLS]");
  made->sep = made->Id("[SEP]");
  made->words = std::make_shared<const WordPiece>(std::move(of_words), made->Id("[UNK]"));
  const bool lowercase = options.cased == 0;
  made->tokenizer = std::make_unique<const Tokenizer>(
      SplitOptions{lowercase, lowercase && options.keep_accents == 0}, made->words, nullptr,
      special);
  return made;
}

// ---- rows ------------------------------------------------------------------------------------

std::vector<std::string_view> Views(const mvbert_text* texts, std::size_t count, const char* what) {
  std::vector<std::string_view> views(count);
  for (std::size_t i = 0; i < count; ++i) {
    views[i] = Text(texts[i].data, texts[i].size);
    RequireUtf8(views[i], what + (" " + std::to_string(i)));
  }
  return views;
}

RowOptions MakeRowOptions(const mvbert_tokenizer& tokenizer, const mvbert_batch_options& options) {
  RequireZero(options.reserved);
  Require(options.max_length >= 0 && options.width >= 0 && options.multiple >= 0,
          "max_length, width and multiple must not be negative");
  Require(options.threads >= 0, "threads must not be negative");
  constexpr Truncation kTruncations[] = {Truncation::kLongestFirst, Truncation::kOnlyFirst,
                                         Truncation::kOnlySecond};
  Require(options.truncation >= MVBERT_LONGEST_FIRST && options.truncation <= MVBERT_ONLY_SECOND,
          "there is no such truncation");
  RowOptions row;
  row.special = options.without_special == 0;
  row.cls = tokenizer.cls;
  row.sep = tokenizer.sep;
  row.pad = tokenizer.pad;
  if (options.max_length > 0) row.truncation = kTruncations[options.truncation];
  row.max_length = static_cast<std::uint64_t>(options.max_length);
  return row;
}

std::size_t Width(const TokenRows& rows, const mvbert_batch_options& options) {
  constexpr auto kLimit = static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max());
  const auto width = static_cast<std::uint64_t>(options.width);
  const auto multiple = static_cast<std::uint64_t>(options.multiple);
  Require(width <= kLimit && multiple <= kLimit, "width and multiple must be below 2^31");
  if (width != 0 && rows.longest() > width) {
    Throw(MVBERT_ERROR_LENGTH, "the longest row has " + std::to_string(rows.longest()) +
                                   " pieces, more than the width " + std::to_string(width) +
                                   "; set max_length to cut it");
  }
  std::optional<std::size_t> wanted;
  if (width != 0) wanted = static_cast<std::size_t>(width);
  return rows.Width(wanted, multiple == 0 ? 1 : static_cast<std::size_t>(multiple));
}

// Copies as many ids as there is room for.
std::int64_t Copy(const IdBuffer& found, std::int32_t* ids, std::size_t capacity) {
  const std::size_t count = std::min(found.size(), capacity);
  if (count != 0) std::memcpy(ids, found.data(), count * sizeof(std::int32_t));
  return static_cast<std::int64_t>(found.size());
}

}  // namespace
}  // namespace mvbert

// ---- the interface -----------------------------------------------------------------------------

extern "C" {

int mvbert_api_version(void) { return MVBERT_API_VERSION; }
const char* mvbert_version(void) { return mvbert::kVersion; }
const char* mvbert_error_message(void) { return mvbert::last_error; }

int mvbert_open(const char* path, const mvbert_options* options, mvbert_tokenizer** tokenizer) {
  if (tokenizer != nullptr) *tokenizer = nullptr;
  return mvbert::Guarded(MVBERT_ERROR_VOCAB, [&]() -> int {
    mvbert::Require(path != nullptr && tokenizer != nullptr, "the path or the result is null");
    *tokenizer = mvbert::Make(mvbert::ReadFile(path), path, options).release();
    return MVBERT_OK;
  });
}

int mvbert_from_memory(const char* vocab, size_t size, const mvbert_options* options,
                       mvbert_tokenizer** tokenizer) {
  if (tokenizer != nullptr) *tokenizer = nullptr;
  return mvbert::Guarded(MVBERT_ERROR_VOCAB, [&]() -> int {
    mvbert::Require(tokenizer != nullptr, "the result is a null pointer");
    *tokenizer = mvbert::Make(mvbert::Text(vocab, size), "the vocabulary", options).release();
    return MVBERT_OK;
  });
}

void mvbert_free(mvbert_tokenizer* tokenizer) { delete tokenizer; }

int32_t mvbert_size(const mvbert_tokenizer* tokenizer) {
  return tokenizer == nullptr ? 0 : static_cast<int32_t>(tokenizer->pieces.size());
}

const char* mvbert_piece(const mvbert_tokenizer* tokenizer, int32_t id) {
  if (id < 0 || id >= mvbert_size(tokenizer)) return nullptr;
  return tokenizer->pieces[static_cast<std::size_t>(id)].c_str();
}

int32_t mvbert_id(const mvbert_tokenizer* tokenizer, const char* piece) {
  return tokenizer == nullptr || piece == nullptr ? -1 : tokenizer->Id(piece);
}

int64_t mvbert_encode(const mvbert_tokenizer* tokenizer, const char* text, size_t size,
                      int32_t special, int32_t* ids, size_t capacity) {
  return mvbert::Guarded(MVBERT_ERROR_INTERNAL, [&]() -> int64_t {
    mvbert::Require(tokenizer != nullptr, "the tokenizer is a null pointer");
    mvbert::Require(ids != nullptr || capacity == 0, "the ids are a null pointer");
    const std::string_view view = mvbert::Text(text, size);
    mvbert::RequireUtf8(view, "the text");
    mvbert::RowOptions options;
    options.special = special != 0;
    options.cls = tokenizer->cls;
    options.sep = tokenizer->sep;
    mvbert::IdBuffer found;
    mvbert::EncodeRow(*tokenizer->tokenizer, view, nullptr, options, &found);
    return mvbert::Copy(found, ids, capacity);
  });
}

int64_t mvbert_encode_spans(const mvbert_tokenizer* tokenizer, const char* text, size_t size,
                            int32_t* ids, uint32_t* spans, size_t capacity) {
  return mvbert::Guarded(MVBERT_ERROR_INTERNAL, [&]() -> int64_t {
    mvbert::Require(tokenizer != nullptr, "the tokenizer is a null pointer");
    mvbert::Require((ids != nullptr && spans != nullptr) || capacity == 0,
                    "the ids or the spans are a null pointer");
    const std::string_view view = mvbert::Text(text, size);
    mvbert::RequireUtf8(view, "the text");
    mvbert::Require(size <= std::numeric_limits<std::int32_t>::max(),
                    "the text has 2^31 bytes or more, whose places do not fit into 32 bits");
    mvbert::IdBuffer found, places;
    tokenizer->tokenizer->EncodeSpans(view, true, &found, &places);
    std::copy_n(places.data(), 2 * std::min(found.size(), capacity), spans);
    return mvbert::Copy(found, ids, capacity);
  });
}

int mvbert_encode_batch(const mvbert_tokenizer* tokenizer, const mvbert_text* texts,
                        const mvbert_text* pairs, size_t count, const mvbert_batch_options* given,
                        mvbert_batch* batch) {
  if (batch != nullptr) *batch = {};
  return mvbert::Guarded(MVBERT_ERROR_LENGTH, [&]() -> int {
    mvbert::Require(tokenizer != nullptr, "the tokenizer is a null pointer");
    mvbert::Require(batch != nullptr, "the batch is a null pointer");
    mvbert::Require(texts != nullptr || count == 0, "the texts are a null pointer");
    const mvbert_batch_options options = given == nullptr ? mvbert_batch_options{} : *given;
    const mvbert::RowOptions row_options = mvbert::MakeRowOptions(*tokenizer, options);
    const int threads = std::max(options.threads, 1);
    const auto first = mvbert::Views(texts, count, "text");
    std::vector<std::string_view> second;
    if (pairs != nullptr) second = mvbert::Views(pairs, count, "pair");
    const mvbert::TokenRows rows(*tokenizer->tokenizer, first, pairs == nullptr ? nullptr : &second,
                                 row_options, threads);
    const std::size_t width = mvbert::Width(rows, options);
    constexpr std::size_t kMost = std::numeric_limits<std::ptrdiff_t>::max() / sizeof(int64_t) / 3;
    if (width != 0 && count > kMost / width) throw std::bad_alloc();
    // One block for the three arrays; input_ids is its address.
    const std::size_t size = count * width;
    auto* const data = static_cast<int64_t*>(std::malloc(std::max<std::size_t>(3 * size, 1) * 8));
    if (data == nullptr) throw std::bad_alloc();
    *batch = {static_cast<int64_t>(count), static_cast<int64_t>(width), data, data + size,
              data + 2 * size};
    rows.FillPadded<int64_t>(threads, width, batch->input_ids, batch->token_type_ids,
                             batch->attention_mask);
    return MVBERT_OK;
  });
}

void mvbert_batch_free(mvbert_batch* batch) {
  if (batch == nullptr) return;
  std::free(batch->input_ids);
  *batch = {};
}

}  // extern "C"
