// The Python face of the core: convert, release the GIL, call. One section a subject, one table of
// definitions at the bottom.

#include <array>
#include <cstdint>
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
#include "mixer.h"
#include "philox.h"
#include "philox_blocks.h"
#include "unicode.h"
#include "vocab_learner.h"
#include "wordpiece.h"
#include "words.h"

namespace py = pybind11;

namespace {

// ---- words and wordpiece ----------------------------------------------------------------

// The UTF-8 of a str, bytes or other contiguous buffer, valid while this object lives. Lone
// surrogates of a str, which have no UTF-8, become U+FFFD (the splitter deletes both alike). Bytes
// must be UTF-8: std::invalid_argument otherwise. Made and destroyed with the GIL held; the view may
// be read without it.
class TextView {
 public:
  explicit TextView(const py::handle& text) {
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
    mvbert::CheckUtf8(view_);
  }

  std::string_view get() const { return view_; }

 private:
  py::object keep_;
  py::buffer_info info_;
  std::string_view view_;
};

py::list Split(const py::object& text, bool lowercase) {
  const TextView view(text);
  mvbert::Words words;
  {
    py::gil_scoped_release release;
    mvbert::WordSplitter({lowercase}).Split(view.get(), &words);
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

// ---- lexicon ----------------------------------------------------------------------------

// ---- vocabulary learner -----------------------------------------------------------------

using Uint64Array = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

py::tuple LearnVocabShim(const py::bytes& bytes, const Uint64Array& ends, const Uint64Array& counts,
                         std::size_t size, double coverage, int threads) {
  if (ends.ndim() != 1 || counts.ndim() != 1 || ends.size() != counts.size()) {
    throw std::invalid_argument("ends and counts must be flat and equally long, got " +
                                std::to_string(ends.size()) + " ends and " +
                                std::to_string(counts.size()) + " counts");
  }
  mvbert::LearnOptions options;
  options.size = size;
  options.coverage = coverage;
  options.threads = threads;
  // The caller holds `bytes` and both arrays until the call returns.
  const std::string_view text = bytes;
  const std::uint64_t* ends_data = ends.data();
  const std::uint64_t* counts_data = counts.data();
  const auto words = static_cast<std::size_t>(ends.size());
  mvbert::LearnedVocab vocab;
  {
    py::gil_scoped_release release;
    vocab = mvbert::LearnVocab(text, ends_data, counts_data, words, options);
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

PYBIND11_MODULE(_tokenizer, m) {
  m.doc() = "C++ core of mvbert: words, WordPiece, lexicon, vocabulary learner, mixed rows.";
  m.attr("__version__") = mvbert::kVersion;
  m.attr("source_hash") = mvbert::kSourceHash;

  // words and wordpiece
  m.attr("unicode_version") = std::string(mvbert::UnicodeVersion());
  m.def("split", &Split, py::arg("text"), py::arg("lowercase") = true,
        "The normalised words of a str or of UTF-8 bytes.");
  m.def("utf8_error", &Utf8Error, py::arg("data"),
        "Offset of the first byte that is not well-formed UTF-8, or None.");
  py::class_<mvbert::WordPiece, std::shared_ptr<mvbert::WordPiece>>(m, "WordPiece")
      .def(py::init<std::vector<std::string>, std::int32_t, int>(), py::arg("pieces"),
           py::arg("unk_id"), py::arg("max_chars") = 100)
      .def("cut", &Cut, py::arg("word"), "The ids of one word.")
      .def("__len__", &mvbert::WordPiece::size)
      .def_property_readonly("unk_id", &mvbert::WordPiece::unk_id)
      .def_property_readonly("max_chars", &mvbert::WordPiece::max_chars);

  // lexicon

  // vocabulary learner
  m.def("learn_vocab", &LearnVocabShim, py::arg("bytes"), py::arg("ends"), py::arg("counts"),
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
