// What the bindings share: Python's texts, buffers and arrays as the core takes and gives them. A
// binding converts, releases the GIL and calls; what is to be decided is decided in the core.

#ifndef MVBERT_BINDINGS_H_
#define MVBERT_BINDINGS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if PY_VERSION_HEX < 0x030B0000 && !defined(PYPY_VERSION)
#include <longintrepr.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unicode.h"

namespace mvbert::python {

namespace py = pybind11;

// One function a subject: each adds its names to the module.
void BindVocab(py::module_& m);
void BindTokenizer(py::module_& m);
void BindTokenRows(py::module_& m);  // after BindTokenizer: it adds to its class
void BindCorpus(py::module_& m);
void BindRows(py::module_& m);

// The bytes of a contiguous buffer, valid while this object lives: every buffer comes in through
// here. Made and destroyed with the GIL held.
class BytesView {
 public:
  explicit BytesView(const py::buffer& buffer) : info_(buffer.request()) {
    if (info_.ndim != 1 || info_.itemsize != 1 || (info_.size > 1 && info_.strides[0] != 1)) {
      throw py::type_error("expected contiguous bytes, got a buffer of another shape");
    }
  }
  std::string_view get() const {
    return {static_cast<const char*>(info_.ptr), static_cast<std::size_t>(info_.size)};
  }

 private:
  py::buffer_info info_;
};

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
    bytes_.emplace(py::reinterpret_borrow<py::buffer>(text));
    view_ = bytes_->get();
    checked_ = false;
  }

  std::string_view get() const { return view_; }
  bool checked() const { return checked_; }
  void Check() const {
    if (!checked_) CheckUtf8(view_);
  }

 private:
  bool checked_ = true;
  py::object keep_;
  std::optional<BytesView> bytes_;
  std::string_view view_;
};

// The UTF-8 of several texts, valid while this object lives. Made and destroyed with the GIL held.
// With `keep`, buffers that others may write to are copied.
class TextViews {
 public:
  explicit TextViews(const py::iterable& texts, bool keep = false)
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
      auto view = std::make_unique<TextView>(text, TextView::kUnchecked);
      if (keep && !PyUnicode_Check(text.ptr()) && !PyBytes_Check(text.ptr())) {
        const std::string_view bytes = view->get();
        view =
            std::make_unique<TextView>(py::bytes(bytes.data(), bytes.size()), TextView::kUnchecked);
      }
      others_.emplace_back(views_.size(), std::move(view));
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

// A vector as a numpy array that owns it: no copy.
template <typename T>
py::array_t<T> Own(std::vector<T> values) {
  auto* storage = new std::vector<T>(std::move(values));
  const py::capsule owner(storage, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(storage->size()), storage->data(), owner);
}

// A vector copied into a numpy array of another type.
template <typename T, typename From>
py::array_t<T> CopyArray(const std::vector<From>& values) {
  py::array_t<T> array(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

// The list of item(i), a new reference or null after an error, for i in [0, size).
template <typename Item>
py::list ListOf(std::size_t size, Item&& item) {
  py::list list(size);
  for (std::size_t i = 0; i < size; ++i) {
    PyObject* const value = item(i);
    if (value == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), value);
  }
  return list;
}

// A one-dimensional C-contiguous array of exactly this type.
template <typename T>
using Flat = py::array_t<T, py::array::c_style>;

}  // namespace mvbert::python

#endif  // MVBERT_BINDINGS_H_
