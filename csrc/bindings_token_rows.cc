// Python: texts to token rows, padded or flat, and lists of ids to arrays.

#include <algorithm>
#include <iterator>
#include <tuple>

#include "bindings.h"
#include "masking.h"
#include "token_rows.h"
#include "tokenizer.h"

namespace mvbert::python {
namespace {

Truncation TruncationNamed(const std::optional<std::string>& name) {
  if (!name) return Truncation::kNone;
  if (*name == "longest_first") return Truncation::kLongestFirst;
  if (*name == "only_first") return Truncation::kOnlyFirst;
  if (*name == "only_second") return Truncation::kOnlySecond;
  throw std::invalid_argument("there is no truncation '" + *name + "'");
}

// [CLS] and [SEP], or neither.
using ClsSep = std::optional<std::pair<std::int32_t, std::int32_t>>;

RowOptions MakeRowOptions(const ClsSep& cls_sep) {
  RowOptions options;
  options.special = cls_sep.has_value();
  if (cls_sep) std::tie(options.cls, options.sep) = *cls_sep;
  return options;
}

// An array of whole 64-bit numbers, or none.
using Numbers = std::optional<Flat<std::int64_t>>;

std::vector<std::uint64_t> CopyNumbers(const Numbers& numbers) {
  if (!numbers) return {};
  return {numbers->data(), numbers->data() + numbers->size()};
}

// How rows are made of texts: what the options of a call mean, for any number of calls.
struct RowPlan {
  RowOptions options;
  bool padded = false;
  std::optional<std::size_t> width;
  std::size_t multiple = 1;
};

RowPlan MakeRowPlan(const ClsSep& cls_sep, std::int32_t pad,
                    const std::optional<std::string>& truncation, std::uint64_t max_length,
                    std::optional<std::uint64_t> stride, bool padded,
                    std::optional<std::size_t> width, std::size_t multiple, bool spans, bool keep) {
  RowPlan plan{MakeRowOptions(cls_sep), padded, width, multiple};
  plan.options.pad = pad;
  plan.options.truncation = TruncationNamed(truncation);
  plan.options.max_length = max_length;
  plan.options.overflow = stride.has_value();
  plan.options.stride = stride.value_or(0);
  plan.options.spans = spans;
  plan.options.keep = keep;
  return plan;
}

// Rows of texts or of pairs, and what is asked of them, at any time if the plan keeps them.
class PlannedRows {
 public:
  // Made and destroyed with the GIL held.
  PlannedRows(std::shared_ptr<const Tokenizer> tokenizer, const py::iterable& texts,
              const std::optional<py::iterable>& pairs, const RowPlan& plan, int threads,
              const Numbers& text_words, const Numbers& pair_words)
      : tokenizer_(std::move(tokenizer)),
        first_(texts, plan.options.keep),
        ends_{CopyNumbers(text_words), CopyNumbers(pair_words)},
        options_(plan.options),
        padded_(plan.padded),
        threads_(threads) {
    if (pairs) second_.emplace(*pairs, plan.options.keep);
    if (text_words) options_.words[0] = &ends_[0];
    if (pair_words) options_.words[1] = &ends_[1];
    py::gil_scoped_release release;
    first_.Check("text");
    if (second_) second_->Check("pair");
    rows_.emplace(*tokenizer_, first_.get(), second_ ? &second_->get() : nullptr, options_,
                  threads);
    if (padded_) width_ = rows_->Width(plan.width, plan.multiple);
  }
  PlannedRows(const PlannedRows&) = delete;
  PlannedRows& operator=(const PlannedRows&) = delete;

  std::size_t size() const { return rows_->size(); }

  std::optional<std::size_t> width() const {
    return padded_ ? std::optional<std::size_t>(width_) : std::nullopt;
  }

  // Of the rows without padding.
  py::array_t<std::int64_t> Offsets() const { return CopyArray<std::int64_t>(rows_->offsets()); }

  // Ids, offsets and token types, flat.
  py::tuple Flat() const {
    py::array_t<std::int32_t> ids(Total());
    py::array_t<std::uint8_t> types(Total());
    std::int32_t* const ids_data = ids.mutable_data();
    std::uint8_t* const types_data = types.mutable_data();
    {
      py::gil_scoped_release release;
      rows_->FillFlat(threads_, ids_data, types_data);
    }
    return py::make_tuple(ids, Offsets(), types);
  }

  // Input ids, token types, attention mask, [B, width].
  py::tuple Padded(bool wide) const {
    return wide ? PaddedArrays<std::int64_t>() : PaddedArrays<std::int32_t>();
  }

  // The sample of each row.
  py::array_t<std::int64_t> Samples() const {
    return OfRows([&](std::size_t row) { return rows_->sample(row); });
  }

  // How many ids of its first text, or of its second, each row has.
  py::array_t<std::int64_t> Sizes(int which) const {
    return OfRows([&](std::size_t row) { return rows_->text_size(row, which); });
  }

  // The number of each piece's word, flat, -1 where none is.
  py::array_t<std::int32_t> Words() const {
    py::array_t<std::int32_t> words(Total());
    Fill<std::int32_t>(nullptr, nullptr, words.mutable_data());
    return words;
  }

  // The same of one row as a list, None where none is and of padding.
  py::list RowWords(std::size_t row) const {
    if (row >= size()) throw py::index_error("there is no such row");
    const auto length = static_cast<std::size_t>(rows_->offsets()[row + 1] - rows_->offsets()[row]);
    std::vector<std::int32_t> words(length);
    rows_->FillWords(row, words.data());
    return ListOf(padded_ ? width_ : length, [&](std::size_t i) {
      return i >= length || words[i] < 0 ? py::none().release().ptr() : PyLong_FromLong(words[i]);
    });
  }

  // Where each piece lies, [N, 2] flat.
  py::array_t<std::int32_t> FlatSpans() const {
    py::array_t<std::int32_t> spans({Total(), py::ssize_t{2}});
    FillSpans(spans.mutable_data());
    return spans;
  }

  // The same as [B, width, 2].
  py::array_t<std::int64_t> PaddedSpans() const {
    py::array_t<std::int64_t> spans({Rows(), Width(), py::ssize_t{2}});
    Fill<std::int64_t>(spans.mutable_data(), nullptr, nullptr, width_);
    return spans;
  }

  // 1 where a piece is of no text, [B, width].
  py::array_t<std::int64_t> PaddedSpecial() const {
    py::array_t<std::int64_t> special({Rows(), Width()});
    Fill<std::int64_t>(nullptr, special.mutable_data(), nullptr, width_);
    return special;
  }

  // A column by its name in a batch, as lists of the rows, padded or not.
  py::list Lists(const std::string& column) const {
    if (column == "attention_mask") {
      return ListOfRows(0, [](std::size_t) { return PyLong_FromLong(1); });
    }
    std::vector<std::int32_t> values(Count());
    if (column == "offset_mapping") {
      values.resize(2 * Count());
      FillSpans(values.data());
      return ListOfRows(std::nullopt, [&](std::size_t i) {
        return py::make_tuple(values[2 * i], values[2 * i + 1]).release().ptr();
      });
    }
    const auto list = [&](std::int32_t fill) {
      return ListOfRows(fill, [&](std::size_t i) { return PyLong_FromLong(values[i]); });
    };
    if (column == "special_tokens_mask") {
      Fill<std::int32_t>(nullptr, values.data(), nullptr);
      return list(1);
    }
    std::vector<std::uint8_t> types(Count());
    rows_->FillFlat(threads_, values.data(), types.data());
    if (column == "input_ids") return list(options_.pad);
    if (column != "token_type_ids") {
      throw std::invalid_argument("there is no column '" + column + "'");
    }
    return ListOfRows(0, [&](std::size_t i) { return PyLong_FromLong(types[i]); });
  }

 private:
  std::size_t Count() const { return static_cast<std::size_t>(rows_->offsets().back()); }
  py::ssize_t Total() const { return static_cast<py::ssize_t>(rows_->offsets().back()); }
  py::ssize_t Rows() const { return static_cast<py::ssize_t>(rows_->size()); }
  py::ssize_t Width() const { return static_cast<py::ssize_t>(width_); }

  template <typename T>
  py::tuple PaddedArrays() const {
    const std::vector<py::ssize_t> shape = {Rows(), Width()};
    py::array_t<T> ids(shape), types(shape), mask(shape);
    T *ids_data = ids.mutable_data(), *types_data = types.mutable_data(),
      *mask_data = mask.mutable_data();
    {
      py::gil_scoped_release release;
      rows_->FillPadded(threads_, width_, ids_data, types_data, mask_data);
    }
    return py::make_tuple(ids, types, mask);
  }

  // The array of number(row) for every row.
  template <typename Number>
  py::array_t<std::int64_t> OfRows(Number&& number) const {
    py::array_t<std::int64_t> array(Rows());
    std::int64_t* const data = array.mutable_data();
    for (std::size_t row = 0; row < rows_->size(); ++row) {
      data[row] = static_cast<std::int64_t>(number(row));
    }
    return array;
  }

  // The lists of value(i), i being a piece's place in flat rows; padded rows end with `fill`, or
  // with (0, 0).
  template <typename Value>
  py::list ListOfRows(std::optional<std::int32_t> fill, Value&& value) const {
    const py::object padding = fill ? py::object(py::int_(*fill)) : py::make_tuple(0, 0);
    const std::vector<std::int64_t>& offsets = rows_->offsets();
    return ListOf(rows_->size(), [&](std::size_t row) {
      const auto begin = static_cast<std::size_t>(offsets[row]);
      const std::size_t size = static_cast<std::size_t>(offsets[row + 1]) - begin;
      return ListOf(padded_ ? width_ : size,
                    [&](std::size_t i) {
                      return i < size ? value(begin + i) : py::object(padding).release().ptr();
                    })
          .release()
          .ptr();
    });
  }

  template <typename T>
  void Fill(T* spans, T* special, std::int32_t* words,
            std::optional<std::size_t> width = std::nullopt) const {
    RowColumns<T> columns;
    columns.spans = spans;
    columns.special = special;
    columns.words = words;
    py::gil_scoped_release release;
    rows_->FillColumns(threads_, width, columns);
  }

  // Flat spans; texts that were encoded without them are encoded again.
  void FillSpans(std::int32_t* spans) const {
    if (options_.spans) {
      Fill<std::int32_t>(spans, nullptr, nullptr);
      return;
    }
    RowOptions options = options_;
    options.spans = true;
    options.keep = false;
    py::gil_scoped_release release;
    const TokenRows again(*tokenizer_, first_.get(), second_ ? &second_->get() : nullptr, options,
                          threads_);
    RowColumns<std::int32_t> columns;
    columns.spans = spans;
    again.FillColumns(threads_, std::nullopt, columns);
  }

  const std::shared_ptr<const Tokenizer> tokenizer_;  // (destroyed last)
  const TextViews first_;
  std::optional<TextViews> second_;
  const std::vector<std::uint64_t> ends_[2];
  RowOptions options_;
  const bool padded_;
  const int threads_;
  std::size_t width_ = 0;
  std::optional<TokenRows> rows_;
};

// The ids of one row as a list.
py::list EncodeList(const Tokenizer& tokenizer, const py::object& text,
                    const std::optional<py::object>& pair, const ClsSep& cls_sep) {
  const TextView first(text, TextView::kUnchecked);
  std::optional<TextView> second;
  if (pair) second.emplace(*pair, TextView::kUnchecked);
  IdBuffer ids;
  {
    py::gil_scoped_release release;
    first.Check();
    if (second) second->Check();
    const std::string_view second_text = second ? second->get() : std::string_view();
    EncodeRow(tokenizer, first.get(), second ? &second_text : nullptr, MakeRowOptions(cls_sep),
              &ids);
  }
  return ListOf(ids.size(), [&](std::size_t i) { return PyLong_FromLong(ids.data()[i]); });
}

// Writes a Python integer of 64 bits. False where it is another object, a subclass or larger. One
// of a single digit, as ids are, is read where it lies.
inline bool ReadInteger(PyObject* value, std::int64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
#if defined(PYPY_VERSION)
#elif PY_VERSION_HEX >= 0x030C0000
  const auto* number = reinterpret_cast<const PyLongObject*>(value);
  if (PyUnstable_Long_IsCompact(number)) {
    *out = PyUnstable_Long_CompactValue(number);
    return true;
  }
#else
  if (Py_SIZE(value) == 1) {
    *out = reinterpret_cast<const PyLongObject*>(value)->ob_digit[0];
    return true;
  }
#endif
  int overflow = 0;
  *out = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

// The same for all of a list, whose size the caller has checked.
inline bool ReadIntegers(PyObject* list, std::int64_t* out) {
  const Py_ssize_t size = PyList_GET_SIZE(list);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!ReadInteger(PyList_GET_ITEM(list, i), out + i)) return false;
  }
  return true;
}

// Whether each item of a list is this very object.
bool HasOnly(PyObject* list, const PyObject* object) {
  std::uintptr_t differ = 0;
  const Py_ssize_t size = PyList_GET_SIZE(list);
  for (Py_ssize_t i = 0; i < size; ++i) {
    differ |= reinterpret_cast<std::uintptr_t>(PyList_GET_ITEM(list, i)) ^
              reinterpret_cast<std::uintptr_t>(object);
  }
  return differ == 0;
}

// Lists of Python integers as one array [rows, width], filled up with `fill`. None where a row is
// no list of at most `width` integers of 64 bits, for the caller to say why.
py::object FilledRows(const py::list& rows, const py::ssize_t width, const std::int64_t fill) {
  const auto count = static_cast<py::ssize_t>(rows.size());
  py::array_t<std::int64_t> array({count, width});
  std::int64_t* out = array.mutable_data();
  for (py::ssize_t number = 0; number < count; ++number, out += width) {
    PyObject* row = PyList_GET_ITEM(rows.ptr(), number);
    if (!PyList_CheckExact(row) || PyList_GET_SIZE(row) > width) return py::none();
    if (!ReadIntegers(row, out)) return py::none();
    std::fill(out + PyList_GET_SIZE(row), out + width, fill);
  }
  return array;
}

// ---- rows of a data set as a padded batch ------------------------------------------------------

// One name of the rows' mappings.
struct RowColumn {
  enum Kind { kIds, kMask, kTypes, kSpecial, kLeftOut };
  Kind kind;
  py::str name;
  std::vector<py::object> lists = {};
};

// The names of a row, or nothing where one is not known: what it means is then for the caller.
std::optional<std::vector<RowColumn>> ColumnsOfRow(PyObject* row) {
  static constexpr std::pair<const char*, RowColumn::Kind> kKinds[] = {
      {"input_ids", RowColumn::kIds},          {"attention_mask", RowColumn::kMask},
      {"token_type_ids", RowColumn::kTypes},   {"special_tokens_mask", RowColumn::kSpecial},
      {"offset_mapping", RowColumn::kLeftOut}, {"labels", RowColumn::kLeftOut},
  };
  std::vector<RowColumn> columns;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(row, &at, &key, &value);) {
    if (!PyUnicode_CheckExact(key)) return std::nullopt;
    const auto* known = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const auto& kind) {
      return PyUnicode_CompareWithASCIIString(key, kind.first) == 0;
    });
    if (known == std::end(kKinds)) return std::nullopt;
    columns.push_back({known->second, py::reinterpret_borrow<py::str>(key)});
  }
  return columns;
}

// Rows of lists of Python integers, in mappings (dicts of the same names) or by themselves, as
// arrays [rows, width] by name and the rows' lengths. What MaskingCollator's plain path makes of
// the same rows; None, for that path to serve or to refuse, where a row is anything else.
//
// What is read is held by this call, and no Python code runs between looking at a size and reading.
py::object PaddedRows(const py::object& features, const std::int64_t pad,
                      const std::int64_t type_pad, const py::ssize_t multiple,
                      const bool with_mask) {
  const bool in_list = PyList_CheckExact(features.ptr());
  if (!in_list && !PyTuple_CheckExact(features.ptr())) return py::none();
  const auto rows = py::reinterpret_steal<py::tuple>(
      in_list ? PyList_AsTuple(features.ptr()) : py::object(features).release().ptr());
  if (!rows) throw py::error_already_set();
  const auto count = static_cast<py::ssize_t>(rows.size());
  if (count == 0) return py::none();

  PyObject* const first = PyTuple_GET_ITEM(rows.ptr(), 0);
  const bool bare = PyList_CheckExact(first);
  std::vector<RowColumn> columns;
  if (bare) {
    columns.push_back({RowColumn::kIds, py::str("input_ids")});
  } else {
    if (!PyDict_CheckExact(first)) return py::none();
    std::optional<std::vector<RowColumn>> found = ColumnsOfRow(first);
    if (!found) return py::none();
    columns = std::move(*found);
  }
  const auto find = [&](RowColumn::Kind kind) {
    return std::find_if(columns.begin(), columns.end(),
                        [&](const RowColumn& column) { return column.kind == kind; });
  };
  const auto ids = find(RowColumn::kIds);
  if (ids == columns.end()) return py::none();

  // The lists, each of its row's length.
  for (RowColumn& column : columns) column.lists.reserve(rows.size());
  py::ssize_t width = 0;
  for (const py::handle row : rows) {
    if (bare) {
      if (!PyList_CheckExact(row.ptr())) return py::none();
      ids->lists.push_back(py::reinterpret_borrow<py::object>(row));
    } else {
      if (!PyDict_CheckExact(row.ptr()) ||
          PyDict_GET_SIZE(row.ptr()) != static_cast<Py_ssize_t>(columns.size())) {
        return py::none();
      }
      for (RowColumn& column : columns) {
        PyObject* const value = PyDict_GetItemWithError(row.ptr(), column.name.ptr());
        if (value == nullptr) {
          if (PyErr_Occurred() != nullptr) throw py::error_already_set();
          return py::none();
        }
        if (column.kind == RowColumn::kLeftOut) continue;
        if (!PyList_CheckExact(value)) return py::none();
        column.lists.push_back(py::reinterpret_borrow<py::object>(value));
      }
    }
    width = std::max(width, PyList_GET_SIZE(ids->lists.back().ptr()));
  }
  if (width == 0) return py::none();
  if (width % multiple != 0) width += multiple - width % multiple;

  const py::int_ zero(0), one(1);
  py::array_t<std::int64_t> lengths(count);
  std::int64_t* const lengths_data = lengths.mutable_data();
  const bool masked = find(RowColumn::kMask) != columns.end();
  py::dict arrays;
  for (const RowColumn& column : columns) {
    if (column.kind == RowColumn::kLeftOut) continue;
    py::array_t<std::int64_t> array({count, width});
    std::int64_t* out = array.mutable_data();
    for (py::ssize_t number = 0; number < count; ++number, out += width) {
      PyObject* const list = column.lists[static_cast<std::size_t>(number)].ptr();
      const Py_ssize_t size = PyList_GET_SIZE(list);
      if (size != PyList_GET_SIZE(ids->lists[static_cast<std::size_t>(number)].ptr()) ||
          size > width) {
        return py::none();
      }
      std::int64_t fill = pad;
      if (column.kind == RowColumn::kMask) {
        fill = 0;
        if (HasOnly(list, one.ptr())) {
          std::fill(out, out + size, 1);
          lengths_data[number] = size;
        } else if (!ReadIntegers(list, out) ||
                   !LengthsOfMask(out, 1, static_cast<std::size_t>(size), lengths_data + number)) {
          return py::none();
        }
      } else if (column.kind == RowColumn::kTypes && HasOnly(list, zero.ptr())) {
        fill = type_pad;
        std::fill(out, out + size, 0);
      } else {
        if (column.kind == RowColumn::kTypes) fill = type_pad;
        if (!ReadIntegers(list, out)) return py::none();
        if (column.kind == RowColumn::kIds && !masked) {
          lengths_data[number] = with_mask ? size : width;
        }
      }
      std::fill(out + size, out + width, fill);
    }
    // The collator leaves out a special_tokens_mask, which is only looked at.
    if (column.kind != RowColumn::kSpecial) arrays[column.name] = array;
  }
  if (with_mask && !masked) {
    py::array_t<std::int64_t> mask({count, width});
    std::int64_t* out = mask.mutable_data();
    for (py::ssize_t number = 0; number < count; ++number, out += width) {
      std::fill(out, out + lengths_data[number], 1);
      std::fill(out + lengths_data[number], out + width, 0);
    }
    arrays["attention_mask"] = mask;
  }
  return py::make_tuple(arrays, lengths);
}

}  // namespace

void BindTokenRows(py::module_& m) {
  m.def("filled_rows", &FilledRows, py::arg("rows"), py::arg("width"), py::arg("fill"));
  m.def("padded_rows", &PaddedRows, py::arg("rows"), py::kw_only(), py::arg("pad"),
        py::arg("type_pad"), py::arg("multiple"), py::arg("with_mask"));
  py::class_<RowPlan>(m, "RowPlan")
      .def(py::init(&MakeRowPlan), py::kw_only(), py::arg("cls_sep"), py::arg("pad") = 0,
           py::arg("truncation") = py::none(), py::arg("max_length") = 0,
           py::arg("stride") = py::none(), py::arg("padded") = false, py::arg("width") = py::none(),
           py::arg("multiple") = 1, py::arg("spans") = false, py::arg("keep") = false);
  py::class_<PlannedRows>(m, "TokenRows")
      .def("__len__", &PlannedRows::size)
      .def_property_readonly("width", &PlannedRows::width)
      .def("offsets", &PlannedRows::Offsets)
      .def("flat", &PlannedRows::Flat)
      .def("padded", &PlannedRows::Padded, py::arg("wide"))
      .def("samples", &PlannedRows::Samples)
      .def("sizes", &PlannedRows::Sizes, py::arg("which"))
      .def("words", &PlannedRows::Words)
      .def("row_words", &PlannedRows::RowWords, py::arg("row"))
      .def("spans", &PlannedRows::FlatSpans)
      .def("padded_spans", &PlannedRows::PaddedSpans)
      .def("padded_special", &PlannedRows::PaddedSpecial)
      .def("lists", &PlannedRows::Lists, py::arg("column"));
  static_cast<py::class_<Tokenizer, std::shared_ptr<Tokenizer>>>(m.attr("Tokenizer"))
      .def("encode_list", &EncodeList, py::arg("text"), py::arg("pair"), py::arg("cls_sep"))
      .def(
          "encode_rows",
          [](std::shared_ptr<const Tokenizer> tokenizer, const py::iterable& texts,
             const std::optional<py::iterable>& pairs, const RowPlan& plan, int threads,
             const Numbers& text_words, const Numbers& pair_words) {
            return std::make_unique<PlannedRows>(std::move(tokenizer), texts, pairs, plan, threads,
                                                 text_words, pair_words);
          },
          py::arg("texts"), py::arg("pairs"), py::arg("plan"), py::arg("threads"),
          py::arg("text_words") = py::none(), py::arg("pair_words") = py::none());
}

}  // namespace mvbert::python
