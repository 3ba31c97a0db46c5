// The Python face of the core: convert, release the GIL, call. One section a subject, one table of
// definitions at the bottom.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "corpus_builder.h"
#include "mixer.h"
#include "philox.h"
#include "philox_blocks.h"
#include "segmentation.h"
#include "token_rows.h"
#include "tokenizer.h"
#include "unicode.h"
#include "vocab_learner.h"
#include "wordpiece.h"
#include "words.h"

namespace py = pybind11;

namespace {

// ---- words and wordpiece ----------------------------------------------------------------

// The UTF-8 of a str, bytes or other contiguous buffer, valid while this object lives. Lone
// surrogates of a str, which have no UTF-8, become U+FFFD (the splitter deletes both alike). Bytes
// must be UTF-8: std::invalid_argument otherwise, now or from Check(). Made and destroyed with the
// GIL held; the view may be read and checked without it.
class TextView {
 public:
  explicit TextView(const py::handle& text) : TextView(text, kUnchecked) { Check(); }

  enum Unchecked { kUnchecked };
  TextView(const py::handle& text, Unchecked) {
    if (PyUnicode_Check(text.ptr())) {
      Py_ssize_t size = 0;
      const char* utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
      if (utf8 != nullptr) {
        keep_ = py::reinterpret_borrow<py::object>(text);
        view_ = {utf8, static_cast<std::size_t>(size)};
        return;
      }
      if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
      PyErr_Clear();
      keep_ = py::reinterpret_steal<py::object>(
          PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
      if (!keep_) throw py::error_already_set();
      char* data = PyBytes_AS_STRING(keep_.ptr());
      const auto bytes = static_cast<std::size_t>(PyBytes_GET_SIZE(keep_.ptr()));
      for (std::size_t i = 0; i + 2 < bytes; ++i) {  // ours alone, so it may be changed
        if (data[i] == '\xED' && static_cast<unsigned char>(data[i + 1]) >= 0xA0) {
          std::memcpy(data + i, "\xEF\xBF\xBD", 3);
        }
      }
      view_ = {data, bytes};
      return;
    }
    if (!PyObject_CheckBuffer(text.ptr())) {
      throw py::type_error("expected str or bytes, got " +
                           std::string(py::str(py::type::of(text).attr("__name__"))));
    }
    info_ = py::reinterpret_borrow<py::buffer>(text).request();
    if (info_.ndim != 1 || info_.itemsize != 1 || (info_.size > 1 && info_.strides[0] != 1)) {
      throw py::type_error("expected contiguous bytes, got a buffer of another shape");
    }
    view_ = {static_cast<const char*>(info_.ptr), static_cast<std::size_t>(info_.size)};
    checked_ = false;
  }

  std::string_view get() const { return view_; }
  bool checked() const { return checked_; }
  void Check() const {
    if (!checked_) mvbert::CheckUtf8(view_);
  }

 private:
  bool checked_ = true;
  py::object keep_;
  py::buffer_info info_;
  std::string_view view_;
};

const mvbert::AsciiRunChoice& AsciiRunNamed(const std::string& name) {
  for (const auto& choice : mvbert::AsciiRunChoices()) {
    if (name == choice.name) return choice;
  }
  throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const auto& choice : mvbert::AsciiRunChoices()) names.emplace_back(choice.name);
  return names;
}

py::list Split(const py::object& text, bool lowercase,
               const std::optional<std::string>& instruction_set, bool strip_accents) {
  const mvbert::WordSplitter splitter(
      {lowercase, strip_accents},
      instruction_set ? AsciiRunNamed(*instruction_set) : mvbert::FastestAsciiRun());
  const TextView view(text);
  mvbert::Words words;
  {
    py::gil_scoped_release release;
    splitter.Split(view.get(), &words);
  }
  py::list result(words.ends.size());
  std::uint32_t begin = 0;
  for (std::size_t i = 0; i < words.ends.size(); ++i) {
    result[i] = py::str(words.bytes.data() + begin, words.ends[i] - begin);
    begin = words.ends[i];
  }
  return result;
}

py::object Utf8Error(const py::buffer& data) {
  const py::buffer_info info = data.request();
  std::size_t at = 0;
  {
    py::gil_scoped_release release;
    at = mvbert::Utf8ErrorOffset({static_cast<const char*>(info.ptr),
                                  static_cast<std::size_t>(info.size * info.itemsize)});
  }
  if (at == mvbert::kNoError) return py::none();
  return py::int_(at);
}

std::vector<std::int32_t> Cut(const mvbert::WordPiece& wordpiece, const py::object& word) {
  const TextView view(word);
  std::vector<std::int32_t> ids;
  wordpiece.Cut(view.get(), &ids);
  return ids;
}

// ---- tokenizer ----------------------------------------------------------------------------------

// A numpy array that owns the buffer's memory.
py::array_t<std::int32_t> TakeIds(mvbert::IdBuffer* ids) {
  const auto size = static_cast<py::ssize_t>(ids->size());
  std::int32_t* data = ids->Release();
  const py::capsule owner(data == nullptr ? std::malloc(1) : data, &std::free);
  return py::array_t<std::int32_t>({size}, {sizeof(std::int32_t)}, data, owner);
}

template <typename T, typename From>
py::array_t<T> CopyArray(const std::vector<From>& values) {
  py::array_t<T> array(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

mvbert::TextOptions MakeTextOptions(bool find_special, std::uint64_t threshold = 0,
                                    std::uint64_t seed = 0) {
  if (threshold > std::uint64_t{1} << 32) {
    throw std::invalid_argument("the coin's threshold must lie in [0, 2^32]");
  }
  mvbert::TextOptions options;
  options.find_special = find_special;
  options.coin.threshold = threshold;
  options.coin.seed = seed;
  return options;
}

std::unique_ptr<mvbert::Tokenizer> MakeTokenizer(
    bool lowercase, bool strip_accents, std::shared_ptr<mvbert::WordPiece> teacher,
    std::shared_ptr<mvbert::WordPiece> student,
    const std::vector<std::tuple<std::string, std::int32_t, bool>>& special) {
  mvbert::SplitOptions options;
  options.lowercase = lowercase;
  options.strip_accents = strip_accents;
  std::vector<mvbert::SpecialPiece> pieces;
  for (const auto& [piece, id, normalized] : special) pieces.push_back({piece, id, normalized});
  return std::make_unique<mvbert::Tokenizer>(options, std::move(teacher), std::move(student),
                                             std::move(pieces));
}

// The UTF-8 of several texts, valid while this object lives. Made and destroyed with the GIL held.
class TextViews {
 public:
  explicit TextViews(const py::iterable& texts)
      : keep_(py::reinterpret_steal<py::tuple>(PySequence_Tuple(texts.ptr()))) {
    if (!keep_) throw py::error_already_set();
    views_.reserve(keep_.size());
    for (const py::handle text : keep_) {
      Py_ssize_t size = 0;
      const char* utf8 =
          PyUnicode_Check(text.ptr()) ? PyUnicode_AsUTF8AndSize(text.ptr(), &size) : nullptr;
      if (utf8 != nullptr) {  // nearly always; the tuple keeps it
        views_.emplace_back(utf8, static_cast<std::size_t>(size));
        continue;
      }
      PyErr_Clear();
      others_.emplace_back(views_.size(), std::make_unique<TextView>(text, TextView::kUnchecked));
      views_.push_back(others_.back().second->get());
    }
  }

  const std::vector<std::string_view>& get() const { return views_; }

  // Throws std::invalid_argument for the first that is not UTF-8. Needs no GIL.
  void Check(const char* what) const {
    for (const auto& [number, view] : others_) {
      try {
        view->Check();
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(number) + " is " +
                                    error.what());
      }
    }
  }

 private:
  py::tuple keep_;
  std::vector<std::pair<std::size_t, std::unique_ptr<TextView>>> others_;  // with their numbers
  std::vector<std::string_view> views_;
};

// The ids of texts, flat, and offsets: text i has ids[offsets[i] : offsets[i + 1]].
py::tuple EncodeTexts(const mvbert::Tokenizer& tokenizer, const py::iterable& texts,
                      bool find_special, std::uint64_t threshold, std::uint64_t seed,
                      std::uint64_t first_number, int threads) {
  const TextViews views(texts);
  mvbert::Encoding encoding;
  {
    py::gil_scoped_release release;
    views.Check("text");
    tokenizer.Encode(views.get(), MakeTextOptions(find_special, threshold, seed), first_number,
                     threads, &encoding);
  }
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(encoding.ends.size() + 1));
  offsets.mutable_data()[0] = 0;
  std::copy(encoding.ends.begin(), encoding.ends.end(), offsets.mutable_data() + 1);
  return py::make_tuple(TakeIds(&encoding.ids), offsets);
}

mvbert::Truncation TruncationNamed(const std::optional<std::string>& name) {
  if (!name) return mvbert::Truncation::kNone;
  if (*name == "longest_first") return mvbert::Truncation::kLongestFirst;
  if (*name == "only_first") return mvbert::Truncation::kOnlyFirst;
  if (*name == "only_second") return mvbert::Truncation::kOnlySecond;
  throw std::invalid_argument("there is no truncation '" + *name + "'");
}

template <typename T>
py::tuple PaddedArrays(const mvbert::TokenRows& rows, std::size_t width, int threads) {
  const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(rows.size()),
                                          static_cast<py::ssize_t>(width)};
  py::array_t<T> ids(shape), types(shape), mask(shape);
  T *ids_data = ids.mutable_data(), *types_data = types.mutable_data(),
    *mask_data = mask.mutable_data();
  {
    py::gil_scoped_release release;
    rows.FillPadded(threads, width, ids_data, types_data, mask_data);
  }
  return py::make_tuple(ids, types, mask);
}

// Rows of texts or of pairs. Without `padded`: ids, offsets, token types, flat. With it: input ids,
// token types, attention mask, [B, width], width the longest row, or `width` if that is given and
// enough, rounded up to a multiple.
py::tuple EncodeRows(const mvbert::Tokenizer& tokenizer, const py::iterable& texts,
                     const std::optional<py::iterable>& pairs,
                     const std::optional<std::pair<std::int32_t, std::int32_t>>& cls_sep,
                     std::int32_t pad, const std::optional<std::string>& truncation,
                     std::uint64_t max_length, bool padded, std::optional<std::size_t> width,
                     std::size_t multiple, bool wide, int threads) {
  mvbert::RowOptions options;
  options.special = cls_sep.has_value();
  if (cls_sep) std::tie(options.cls, options.sep) = *cls_sep;
  options.pad = pad;
  options.truncation = TruncationNamed(truncation);
  options.max_length = max_length;
  mvbert::TextOptions text_options = MakeTextOptions(true);
  text_options.limit = mvbert::TokenRows::Limit(options);
  const TextViews first(texts);
  std::optional<TextViews> second;
  if (pairs) second.emplace(*pairs);
  if (second && second->get().size() != first.get().size()) {
    throw std::invalid_argument("there are " + std::to_string(first.get().size()) + " texts and " +
                                std::to_string(second->get().size()) + " pairs");
  }
  struct Parts {
    const mvbert::Tokenizer& tokenizer;
    std::vector<mvbert::Encoding> encodings;
    ~Parts() { tokenizer.Recycle(&encodings); }
  };
  Parts parts{tokenizer, {}}, second_parts{tokenizer, {}};
  std::optional<mvbert::TokenRows> rows;
  {
    py::gil_scoped_release release;
    first.Check("text");
    tokenizer.EncodeParts(first.get(), text_options, 0, threads, &parts.encodings);
    if (second) {
      second->Check("pair");
      tokenizer.EncodeParts(second->get(), text_options, 0, threads, &second_parts.encodings);
    }
    rows.emplace(parts.encodings, second ? &second_parts.encodings : nullptr, options);
  }
  if (!padded) {
    const auto total = static_cast<py::ssize_t>(rows->offsets().back());
    py::array_t<std::int32_t> ids(total);
    py::array_t<std::uint8_t> types(total);
    std::int32_t* const ids_data = ids.mutable_data();
    std::uint8_t* const types_data = types.mutable_data();
    {
      py::gil_scoped_release release;
      rows->FillFlat(threads, ids_data, types_data);
    }
    return py::make_tuple(ids, CopyArray<std::int64_t>(rows->offsets()), types);
  }
  if (width && rows->longest() > *width) {
    std::size_t row = 0;
    const auto& offsets = rows->offsets();
    while (static_cast<std::size_t>(offsets[row + 1] - offsets[row]) <= *width) ++row;
    throw std::invalid_argument("row " + std::to_string(row) + " has " +
                                std::to_string(offsets[row + 1] - offsets[row]) +
                                " pieces, more than max_length " + std::to_string(*width) +
                                "; pass truncation=True");
  }
  const std::size_t least = width.value_or(rows->longest());
  const std::size_t columns = (least + multiple - 1) / multiple * multiple;
  return wide ? PaddedArrays<std::int64_t>(*rows, columns, threads)
              : PaddedArrays<std::int32_t>(*rows, columns, threads);
}

// The ids of one row as a list.
py::list EncodeList(const mvbert::Tokenizer& tokenizer, const py::object& text,
                    const std::optional<py::object>& pair,
                    const std::optional<std::pair<std::int32_t, std::int32_t>>& cls_sep) {
  const TextView first(text, TextView::kUnchecked);
  std::optional<TextView> second;
  if (pair) second.emplace(*pair, TextView::kUnchecked);
  mvbert::IdBuffer ids;
  const auto append = [&ids](std::int32_t id) { ids.Append(&id, 1); };
  {
    py::gil_scoped_release release;
    if (cls_sep) append(cls_sep->first);
    const TextView* const views[] = {&first, second ? &*second : nullptr};
    for (const TextView* view : views) {
      if (view == nullptr) continue;
      view->Check();
      tokenizer.EncodeWords(view->get(), MakeTextOptions(true), 0, &ids, nullptr);
      if (cls_sep) append(cls_sep->second);
    }
  }
  py::list list(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    PyObject* id = PyLong_FromLong(ids.data()[i]);
    if (id == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), id);
  }
  return list;
}

py::array_t<std::int32_t> EncodeLong(const mvbert::Tokenizer& tokenizer, const py::buffer& data,
                                     bool find_special, int threads) {
  const py::buffer_info info = data.request();
  const std::string_view text(static_cast<const char*>(info.ptr),
                              static_cast<std::size_t>(info.size * info.itemsize));
  mvbert::IdBuffer ids;
  {
    py::gil_scoped_release release;
    mvbert::CheckUtf8(text);
    tokenizer.EncodeLong(text, find_special, threads, &ids);
  }
  return TakeIds(&ids);
}

// ids, where each word's ids begin, whether the student cut it.
py::tuple EncodeWords(const mvbert::Tokenizer& tokenizer, const py::object& text, bool find_special,
                      std::uint64_t threshold, std::uint64_t seed, std::uint64_t number) {
  const TextView view(text, TextView::kUnchecked);
  mvbert::IdBuffer ids;
  mvbert::WordMap words;
  {
    py::gil_scoped_release release;
    view.Check();
    tokenizer.EncodeWords(view.get(), MakeTextOptions(find_special, threshold, seed), number, &ids,
                          &words);
  }
  return py::make_tuple(TakeIds(&ids), CopyArray<std::int32_t>(words.starts),
                        CopyArray<bool>(words.from_student));
}

// ids, and spans [n, 2] in characters of the text.
py::tuple EncodeSpans(const mvbert::Tokenizer& tokenizer, const py::object& text,
                      bool find_special) {
  const TextView view(text, TextView::kUnchecked);
  mvbert::IdBuffer ids;
  std::vector<mvbert::Span> spans;
  {
    py::gil_scoped_release release;
    view.Check();
    tokenizer.EncodeSpans(view.get(), find_special, &ids, &spans);
  }
  py::array_t<std::int32_t> array({static_cast<py::ssize_t>(spans.size()), py::ssize_t{2}});
  std::int32_t* out = array.mutable_data();
  for (const mvbert::Span& span : spans) {
    *out++ = static_cast<std::int32_t>(span.begin);
    *out++ = static_cast<std::int32_t>(span.end);
  }
  return py::make_tuple(TakeIds(&ids), array);
}

// ---- lexicon ----------------------------------------------------------------------------

// A vector as a numpy array that owns it: no copy.
template <typename T>
py::array_t<T> Own(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

// The bytes of a contiguous buffer, valid while `info` lives.
std::string_view BytesOf(const py::buffer_info& info) {
  if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw py::type_error("expected contiguous bytes, got a buffer of another shape");
  }
  return {static_cast<const char*>(info.ptr), static_cast<std::size_t>(info.size)};
}

using Ends = py::array_t<std::uint64_t, py::array::c_style>;

std::unique_ptr<mvbert::CorpusBuilder> MakeCorpusBuilder(bool lowercase, bool strip_accents,
                                                         double heldout_share,
                                                         std::uint64_t seed, bool replace,
                                                         int threads, std::size_t block_bytes) {
  mvbert::CorpusOptions options;
  options.split.lowercase = lowercase;
  options.split.strip_accents = strip_accents;
  options.heldout_share = heldout_share;
  options.seed = seed;
  options.replace = replace;
  options.threads = threads;
  options.block_bytes = block_bytes;
  return std::make_unique<mvbert::CorpusBuilder>(options);
}

void BeginSource(mvbert::CorpusBuilder& builder, std::uint32_t source, const std::string& part,
                 std::uint64_t offset) {
  using mvbert::Destination;
  if (part != "draw" && part != "train" && part != "heldout") {
    throw std::invalid_argument("part must be draw, train or heldout, got " + part);
  }
  const py::gil_scoped_release release;
  builder.BeginSource(source,
                      part == "draw"    ? Destination::kByDraw
                      : part == "train" ? Destination::kTrain
                                        : Destination::kHeldOut,
                      offset);
}

void AddText(mvbert::CorpusBuilder& builder, const py::buffer& text) {
  const py::buffer_info info = text.request();
  const std::string_view view = BytesOf(info);
  const py::gil_scoped_release release;
  builder.AddText(view);
}

void AddDocuments(mvbert::CorpusBuilder& builder, const py::buffer& text, const Ends& ends) {
  const py::buffer_info info = text.request();
  const std::string_view view = BytesOf(info);
  const std::uint64_t* end = ends.data();
  const py::ssize_t count = ends.size();
  const py::gil_scoped_release release;
  std::uint64_t begin = 0;
  for (py::ssize_t i = 0; i < count; ++i) {
    if (end[i] < begin || end[i] > view.size()) {
      throw std::invalid_argument("the ends of the documents must ascend within the text");
    }
    builder.AddDocument(view.substr(begin, end[i] - begin));
    begin = end[i];
  }
}

py::tuple Take(mvbert::CorpusBuilder& builder) {
  mvbert::Taken taken;
  {
    const py::gil_scoped_release release;
    taken = builder.Take();
  }
  py::list train, heldout;
  for (auto& ids : taken.train) train.append(Own(std::move(ids)));
  for (auto& ids : taken.heldout) heldout.append(Own(std::move(ids)));
  return py::make_tuple(train, heldout);
}

py::dict Totals(const mvbert::CorpusBuilder& builder) {
  const mvbert::CorpusTotals& totals = builder.totals();
  py::dict result;
  result["bytes"] = totals.bytes;
  result["documents"] = totals.documents;
  result["train_documents"] = totals.train_documents;
  result["heldout_documents"] = totals.heldout_documents;
  result["train_words"] = totals.train_words;
  result["heldout_words"] = totals.heldout_words;
  result["replaced"] = totals.replaced;
  return result;
}

// (offset, documents, bytes), or None.
py::object Pause(mvbert::CorpusBuilder& builder) {
  mvbert::CorpusBuilder::PausePoint point{};
  bool paused = false;
  {
    const py::gil_scoped_release release;
    paused = builder.Pause(&point);
  }
  if (!paused) return py::none();
  return py::make_tuple(point.offset, point.documents, point.bytes);
}

// The words from an id on, each followed by a line break.
py::bytes NewWords(mvbert::CorpusBuilder& builder, std::uint32_t first) {
  std::string lines;
  const mvbert::Lexicon& lexicon = builder.lexicon();
  for (std::uint32_t id = first; id < lexicon.size(); ++id) {
    lines.append(lexicon.word(id));
    lines.push_back('\n');
  }
  return lines;
}

void Restore(mvbert::CorpusBuilder& builder, const py::buffer& words,
             const py::array_t<std::uint32_t, py::array::c_style>& train, const py::dict& values) {
  const py::buffer_info info = words.request();
  const std::string_view view = BytesOf(info);
  mvbert::CorpusTotals totals;
  totals.bytes = values["bytes"].cast<std::uint64_t>();
  totals.documents = values["documents"].cast<std::uint64_t>();
  totals.train_documents = values["train_documents"].cast<std::uint64_t>();
  totals.heldout_documents = values["heldout_documents"].cast<std::uint64_t>();
  totals.train_words = values["train_words"].cast<std::uint64_t>();
  totals.heldout_words = values["heldout_words"].cast<std::uint64_t>();
  totals.replaced = values["replaced"].cast<std::uint64_t>();
  const std::uint32_t* ids = train.data();
  const auto size = static_cast<std::size_t>(train.size());
  const py::gil_scoped_release release;
  builder.Restore(view, ids, size, totals);
}

// A lexicon in final order as arrays, and the final id of each of its ids.
struct FinalLexicon {
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint64_t> ends, counts;
  std::vector<std::uint32_t> final_ids;
};

FinalLexicon Finish(const mvbert::Lexicon& lexicon) {
  FinalLexicon result;
  const std::vector<std::uint32_t> order = lexicon.Order();
  result.final_ids.resize(order.size());
  result.ends.reserve(order.size());
  result.counts.reserve(order.size());
  for (std::uint32_t i = 0; i < order.size(); ++i) {
    const std::string_view word = lexicon.word(order[i]);
    result.bytes.insert(result.bytes.end(), word.begin(), word.end());
    result.ends.push_back(result.bytes.size());
    result.counts.push_back(lexicon.count(order[i]));
    result.final_ids[order[i]] = i;
  }
  return result;
}

// The union of lexicons given as (bytes, ends, counts), and the final ids of each one's words.
py::tuple MergeLexicons(
    const std::vector<std::tuple<py::buffer, Ends, Ends>>& lexicons) {
  mvbert::Lexicon merged;
  std::vector<std::vector<std::uint32_t>> maps;
  for (const auto& [bytes, ends, counts] : lexicons) {
    const py::buffer_info info = bytes.request();
    const std::string_view view = BytesOf(info);
    if (ends.size() != counts.size()) {
      throw std::invalid_argument("a lexicon has as many counts as words");
    }
    const std::uint64_t* end = ends.data();
    const std::uint64_t* count = counts.data();
    const py::ssize_t words = ends.size();
    const py::gil_scoped_release release;
    std::vector<std::uint32_t>& map = maps.emplace_back();
    map.reserve(static_cast<std::size_t>(words));
    std::uint64_t begin = 0;
    for (py::ssize_t w = 0; w < words; ++w) {
      if (end[w] < begin || end[w] > view.size() || (end[w] == begin) != (w == 0)) {
        throw std::invalid_argument("the words of a lexicon, but the first, must have bytes");
      }
      const std::string_view word = view.substr(begin, end[w] - begin);
      map.push_back(w == 0 ? mvbert::kDocumentMark
                           : merged.Intern(word, mvbert::HashWord(word)));
      merged.Count(map.back(), count[w]);
      begin = end[w];
    }
  }
  FinalLexicon result;
  {
    const py::gil_scoped_release release;
    result = Finish(merged);
    for (auto& map : maps) {
      for (std::uint32_t& id : map) id = result.final_ids[id];
    }
  }
  py::list final_ids;
  for (auto& map : maps) final_ids.append(Own(std::move(map)));
  return py::make_tuple(Own(std::move(result.bytes)), Own(std::move(result.ends)),
                        Own(std::move(result.counts)), final_ids);
}

void CountIds(mvbert::CorpusBuilder& builder,
              const py::array_t<std::uint32_t, py::array::c_style>& ids) {
  const std::uint32_t* id = ids.data();
  const py::ssize_t size = ids.size();
  const py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < size; ++i) builder.lexicon().Count(id[i], 1);
}

// The lexicon in final order and the map to it; the `moved` words leave the train part first.
py::tuple LexiconArrays(mvbert::CorpusBuilder& builder,
                        const py::array_t<std::uint32_t, py::array::c_style>& moved) {
  const std::uint32_t* moved_ids = moved.data();
  const py::ssize_t moved_count = moved.size();
  FinalLexicon result;
  {
    const py::gil_scoped_release release;
    mvbert::Lexicon& lexicon = builder.lexicon();
    for (py::ssize_t i = 0; i < moved_count; ++i) lexicon.Uncount(moved_ids[i], 1);
    result = Finish(lexicon);
  }
  return py::make_tuple(Own(std::move(result.bytes)), Own(std::move(result.ends)),
                        Own(std::move(result.counts)), Own(std::move(result.final_ids)));
}

py::array_t<std::uint32_t> HeldoutDraws(std::uint64_t seed, std::uint64_t documents) {
  std::vector<std::uint32_t> draws(documents);
  {
    const py::gil_scoped_release release;
    for (std::uint64_t d = 0; d < documents; ++d) draws[d] = mvbert::HeldOutDraw::Draw(seed, d);
  }
  return Own(std::move(draws));
}

py::tuple SegmentLexicon(const py::buffer& bytes, const Ends& word_ends,
                         const mvbert::WordPiece& wordpiece, int threads) {
  const py::buffer_info info = bytes.request();
  const std::string_view view = BytesOf(info);
  const std::uint64_t* ends = word_ends.data();
  const auto words = static_cast<std::size_t>(word_ends.size());
  mvbert::Segmentation segmentation;
  {
    const py::gil_scoped_release release;
    segmentation = mvbert::SegmentLexicon(view, ends, words, wordpiece, threads);
  }
  return py::make_tuple(Own(std::move(segmentation.ends)), Own(std::move(segmentation.ids)));
}

// ---- vocabulary learner -----------------------------------------------------------------

py::tuple LearnVocab(const py::buffer& bytes, const Ends& ends, const Ends& counts,
                     std::size_t size, double coverage, int threads) {
  const py::buffer_info info = bytes.request();
  const std::string_view view = BytesOf(info);
  if (ends.ndim() != 1 || counts.ndim() != 1 || ends.size() != counts.size()) {
    throw std::invalid_argument("ends and counts must be flat and equally long, got " +
                                std::to_string(ends.size()) + " ends and " +
                                std::to_string(counts.size()) + " counts");
  }
  mvbert::LearnOptions options;
  options.size = size;
  options.coverage = coverage;
  options.threads = threads;
  // The caller holds the buffer and both arrays until the call returns.
  const std::uint64_t* word_ends = ends.data();
  const std::uint64_t* word_counts = counts.data();
  const auto words = static_cast<std::size_t>(ends.size());
  mvbert::LearnedVocab vocab;
  {
    const py::gil_scoped_release release;
    vocab = mvbert::LearnVocab(view, word_ends, word_counts, words, options);
  }
  return py::make_tuple(vocab.pieces, vocab.uses, vocab.alphabet, vocab.threshold);
}

// ---- mixer ------------------------------------------------------------------------------

// A one-dimensional C-contiguous array of exactly this type: never a silent copy.
template <typename T>
using Flat = py::array_t<T, py::array::c_style>;

mvbert::Segments SegmentsShim(const Flat<std::uint32_t>& ends, const Flat<std::int32_t>& ids,
                              std::int32_t size, std::int32_t cls, std::int32_t sep,
                              std::int32_t mask, std::vector<std::int32_t> special) {
  mvbert::Segments segments;
  segments.ends = ends.data();
  segments.ids = ids.data();
  segments.words = static_cast<std::size_t>(ends.size());
  segments.pieces = static_cast<std::size_t>(ids.size());
  segments.size = size;
  segments.cls = cls;
  segments.sep = sep;
  segments.mask = mask;
  segments.special = std::move(special);
  return segments;
}

// (ends u32 [W], ids i32, size, cls, sep, mask, special ids)
using SegmentsArguments = std::tuple<Flat<std::uint32_t>, Flat<std::int32_t>, std::int32_t,
                                     std::int32_t, std::int32_t, std::int32_t,
                                     std::vector<std::int32_t>>;

std::shared_ptr<mvbert::PieceTable> PieceTableShim(
    const std::optional<SegmentsArguments>& teacher,
    const std::optional<SegmentsArguments>& student) {
  std::optional<mvbert::Segments> parts[2];
  if (teacher) parts[0] = std::apply(SegmentsShim, *teacher);
  if (student) parts[1] = std::apply(SegmentsShim, *student);
  // The argument tuples hold the arrays until the table is made.
  py::gil_scoped_release release;
  return std::make_shared<mvbert::PieceTable>(parts[0] ? &*parts[0] : nullptr,
                                              parts[1] ? &*parts[1] : nullptr);
}

// (document marks, pieces under the first vocabulary, pieces under the second)
std::tuple<std::uint64_t, std::uint64_t, std::uint64_t> MeasureShim(
    const mvbert::PieceTable& table, const Flat<std::uint32_t>& stream, int threads) {
  py::gil_scoped_release release;
  const auto totals = mvbert::StreamTotals::Of(table, stream.data(),
                                               static_cast<std::size_t>(stream.size()), threads);
  return {totals.marks, totals.pieces[0], totals.pieces[1]};
}

// A Mixer and what it points to.
struct MixerShim {
  std::shared_ptr<mvbert::PieceTable> table;
  Flat<std::uint32_t> stream;
  mvbert::Mixer mixer;

  MixerShim(std::shared_ptr<mvbert::PieceTable> table_in, Flat<std::uint32_t> stream_in,
            std::uint64_t seed, std::uint32_t T, std::uint32_t stride,
            std::uint64_t pair_threshold, std::uint32_t capacity,
            std::vector<std::uint32_t> budgets)
      : table(std::move(table_in)),
        stream(std::move(stream_in)),
        mixer(*table, stream.data(), static_cast<std::size_t>(stream.size()),
              {seed, T, stride, pair_threshold, capacity, std::move(budgets)}) {}

  void Read(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold,
            int threads, Flat<std::int32_t> input_ids, Flat<std::uint8_t> token_type_ids,
            Flat<std::int32_t> masked_positions, Flat<std::int32_t> labels) const {
    const std::uint64_t T = mixer.options().T, M = mixer.options().capacity;
    const auto check = [&](const py::array& array, std::uint64_t width, const char* name) {
      if (static_cast<std::uint64_t>(array.size()) != count * width) {
        throw std::invalid_argument(std::string(name) + " must have " +
                                    std::to_string(count * width) + " elements, got " +
                                    std::to_string(array.size()));
      }
    };
    check(input_ids, T, "input_ids");
    check(token_type_ids, T, "token_type_ids");
    check(masked_positions, M, "masked_positions");
    check(labels, M, "labels");
    const mvbert::Mixer::Rows out = {input_ids.mutable_data(), token_type_ids.mutable_data(),
                                     masked_positions.mutable_data(), labels.mutable_data()};
    py::gil_scoped_release release;
    mixer.Read(start, count, student_threshold, threads, out);
  }

  std::vector<std::uint64_t> Starts(std::uint64_t start, std::size_t count) const {
    py::gil_scoped_release release;
    std::vector<std::uint64_t> first(count);
    mixer.Starts(start, count, first.data());
    return first;
  }
};

// {name: 64 numbers} for every implementation that this machine can run.
std::vector<std::pair<std::string, std::vector<std::uint32_t>>> PhiloxBlocksShim(
    std::array<std::uint32_t, 16> first, std::array<std::uint32_t, 3> rest,
    std::array<std::uint32_t, 2> key) {
  std::vector<std::pair<std::string, std::vector<std::uint32_t>>> results;
  for (const mvbert::PhiloxBlocksChoice& choice : mvbert::PhiloxBlocksChoices()) {
    results.emplace_back(choice.name, std::vector<std::uint32_t>(64));
    choice.function(first.data(), rest, key, results.back().second.data());
  }
  return results;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of mvbert: words, WordPiece, lexicon, vocabulary learner, mixed rows.";
  m.attr("__version__") = mvbert::kVersion;
  m.attr("source_hash") = mvbert::kSourceHash;

  // words and wordpiece
  m.attr("unicode_version") = std::string(mvbert::UnicodeVersion());
  m.def("split", &Split, py::arg("text"), py::arg("lowercase") = true,
        py::arg("instruction_set") = py::none(), py::arg("strip_accents") = true,
        "The normalised words of a str or of UTF-8 bytes.");
  m.def("instruction_sets", &InstructionSets,
        "The ways to read ASCII that this machine has; the last is used unless another is named.");
  m.def("utf8_error", &Utf8Error, py::arg("data"),
        "Offset of the first byte that is not well-formed UTF-8, or None.");
  py::class_<mvbert::WordPiece, std::shared_ptr<mvbert::WordPiece>>(m, "WordPiece")
      .def(py::init<std::vector<std::string>, std::int32_t, int>(), py::arg("pieces"),
           py::arg("unk_id"), py::arg("max_chars") = 100)
      .def("cut", &Cut, py::arg("word"), "The ids of one word.")
      .def("__len__", &mvbert::WordPiece::size);

  // tokenizer
  py::class_<mvbert::Tokenizer>(m, "Tokenizer")
      .def(py::init(&MakeTokenizer), py::kw_only(), py::arg("lowercase"),
           py::arg("strip_accents") = true, py::arg("teacher"),
           py::arg("student") = nullptr,
           py::arg("special") = std::vector<std::tuple<std::string, std::int32_t, bool>>())
      .def("encode_list", &EncodeList, py::arg("text"), py::arg("pair"), py::arg("cls_sep"))
      .def("encode_rows", &EncodeRows, py::arg("texts"), py::arg("pairs"), py::kw_only(),
           py::arg("cls_sep"), py::arg("pad"), py::arg("truncation"), py::arg("max_length"),
           py::arg("padded"), py::arg("width"), py::arg("multiple"), py::arg("wide"),
           py::arg("threads"))
      .def("encode_texts", &EncodeTexts, py::arg("texts"), py::arg("find_special"),
           py::arg("threshold") = 0, py::arg("seed") = 0, py::arg("first_number") = 0,
           py::arg("threads") = 1)
      .def("encode_long", &EncodeLong, py::arg("data"), py::arg("find_special"),
           py::arg("threads") = 1)
      .def("encode_words", &EncodeWords, py::arg("text"), py::arg("find_special"),
           py::arg("threshold") = 0, py::arg("seed") = 0, py::arg("number") = 0)
      .def("encode_spans", &EncodeSpans, py::arg("text"), py::arg("find_special"))
      .def("forget_words", &mvbert::Tokenizer::ForgetWords);

  // lexicon
  static PyObject* not_utf8 =
      py::exception<mvbert::NotUtf8>(m, "NotUtf8", PyExc_ValueError).release().ptr();
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const mvbert::NotUtf8& e) {
      PyErr_SetObject(not_utf8, py::make_tuple(e.source, e.offset).ptr());
    }
  });
  py::class_<mvbert::CorpusBuilder>(m, "CorpusBuilder")
      .def(py::init(&MakeCorpusBuilder), py::kw_only(), py::arg("lowercase"),
           py::arg("strip_accents") = true, py::arg("heldout_share"), py::arg("seed"), py::arg("replace"), py::arg("threads"),
           py::arg("block_bytes") = 1 << 20)
      .def("begin_source", &BeginSource, py::arg("source"), py::arg("part"), py::arg("offset") = 0)
      .def("add_text", &AddText, py::arg("text"))
      .def("add_documents", &AddDocuments, py::arg("text"), py::arg("ends"))
      .def("flush", &mvbert::CorpusBuilder::Flush, py::call_guard<py::gil_scoped_release>())
      .def("pause", &Pause)
      .def("new_words", &NewWords, py::arg("first"))
      .def("restore", &Restore, py::arg("words"), py::arg("train"), py::arg("totals"))
      .def("take", &Take)
      .def("totals", &Totals)
      .def("count", &CountIds, py::arg("ids"))
      .def("lexicon", &LexiconArrays, py::arg("moved"));
  m.def("merge_lexicons", &MergeLexicons, py::arg("lexicons"));
  m.def("heldout_draws", &HeldoutDraws, py::arg("seed"), py::arg("documents"));
  m.def("segment_lexicon", &SegmentLexicon, py::arg("bytes"), py::arg("word_ends"),
        py::arg("wordpiece"), py::arg("threads"));

  // vocabulary learner
  m.def("learn_vocab", &LearnVocab, py::arg("bytes"), py::arg("ends"), py::arg("counts"),
        py::arg("size"), py::arg("coverage"), py::arg("threads"),
        "(pieces, uses, alphabet, threshold): exactly `size` pieces learned top-down.");

  // mixer
  m.def("philox4x32", &mvbert::Philox4x32, py::arg("counter"), py::arg("key"));
  m.def("philox_blocks", &PhiloxBlocksShim, py::arg("first"), py::arg("rest"), py::arg("key"));
  py::class_<mvbert::PieceTable, std::shared_ptr<mvbert::PieceTable>>(m, "PieceTable")
      .def(py::init(&PieceTableShim), py::arg("teacher"), py::arg("student"))
      .def("measure", &MeasureShim, py::arg("stream").noconvert(), py::arg("threads"));
  py::class_<MixerShim>(m, "Mixer")
      .def(py::init<std::shared_ptr<mvbert::PieceTable>, Flat<std::uint32_t>, std::uint64_t,
                    std::uint32_t, std::uint32_t, std::uint64_t, std::uint32_t,
                    std::vector<std::uint32_t>>(),
           py::arg("table"), py::arg("stream").noconvert(), py::arg("seed"), py::arg("T"),
           py::arg("stride"), py::arg("pair_threshold"), py::arg("capacity"), py::arg("budgets"))
      .def("read", &MixerShim::Read, py::arg("start"), py::arg("count"),
           py::arg("student_threshold"), py::arg("threads"), py::arg("input_ids").noconvert(),
           py::arg("token_type_ids").noconvert(), py::arg("masked_positions").noconvert(),
           py::arg("labels").noconvert())
      .def("starts", &MixerShim::Starts, py::arg("start"), py::arg("count"));
}
