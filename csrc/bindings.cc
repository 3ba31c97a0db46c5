// The Python face of the core: convert, release the GIL, call. One section a subject, one table of
// definitions at the bottom.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "unicode.h"
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

// ---- mixer ------------------------------------------------------------------------------

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

  // mixer
}
