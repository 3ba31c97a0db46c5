// Python: texts to token rows, padded or flat, and lists of ids to arrays.

#include <algorithm>
#include <tuple>

#include "bindings.h"
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

// Ids, offsets and token types of flat rows.
py::tuple FlatArrays(const TokenRows& rows, int threads) {
  py::array_t<std::int32_t> ids(rows.offsets().back());
  py::array_t<std::uint8_t> types(rows.offsets().back());
  std::int32_t* const ids_data = ids.mutable_data();
  std::uint8_t* const types_data = types.mutable_data();
  {
    py::gil_scoped_release release;
    rows.FillFlat(threads, ids_data, types_data);
  }
  return py::make_tuple(ids, CopyArray<std::int64_t>(rows.offsets()), types);
}

template <typename T>
py::tuple PaddedArrays(const TokenRows& rows, std::size_t width, int threads) {
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

// The array of number(row) for every row.
template <typename Number>
py::array_t<std::int64_t> OfRows(const TokenRows& rows, Number&& number) {
  py::array_t<std::int64_t> array(static_cast<py::ssize_t>(rows.size()));
  std::int64_t* const data = array.mutable_data();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    data[row] = static_cast<std::int64_t>(number(row));
  }
  return array;
}

// Further columns, each None unless asked for: spans, special pieces, words. Padded ones are of
// shape [B, width], flat ones, and words, of [N].
template <typename T>
py::tuple ColumnArrays(const TokenRows& rows, std::optional<std::size_t> width, bool spans,
                       bool special, bool words, int threads) {
  std::vector<py::ssize_t> shape = {rows.offsets().back()};
  if (width) shape = {static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(*width)};
  std::vector<py::ssize_t> pairs = shape;
  pairs.push_back(2);
  py::object arrays[3] = {py::none(), py::none(), py::none()};
  RowColumns<T> columns;
  const auto make = [&](int place, auto array, auto** column) {
    *column = array.mutable_data();
    arrays[place] = std::move(array);
  };
  if (spans) make(0, py::array_t<T>(pairs), &columns.spans);
  if (special) make(1, py::array_t<T>(shape), &columns.special);
  if (words) make(2, py::array_t<std::int32_t>(rows.offsets().back()), &columns.words);
  if (spans || special || words) {
    py::gil_scoped_release release;
    rows.FillColumns(threads, width, columns);
  }
  return py::make_tuple(arrays[0], arrays[1], arrays[2]);
}

// Rows of texts or of pairs. Without `padded`: ids, offsets, token types, flat. With it: input ids,
// token types, attention mask, [B, TokenRows::Width(width, multiple)]. With `layout` further: the
// sample of each row if a stride makes samples overflow, the sizes of its first and second texts
// (the latter only of pairs), and what ColumnArrays gives.
py::tuple EncodeRows(const Tokenizer& tokenizer, const py::iterable& texts,
                     const std::optional<py::iterable>& pairs, const ClsSep& cls_sep,
                     std::int32_t pad, const std::optional<std::string>& truncation,
                     std::uint64_t max_length, bool padded, std::optional<std::size_t> width,
                     std::size_t multiple, bool wide, int threads, bool layout,
                     std::optional<std::uint64_t> stride, const Numbers& text_words,
                     const Numbers& pair_words, bool spans, bool special, bool words) {
  RowOptions options = MakeRowOptions(cls_sep);
  options.pad = pad;
  options.truncation = TruncationNamed(truncation);
  options.max_length = max_length;
  options.overflow = stride.has_value();
  options.stride = stride.value_or(0);
  options.spans = spans;
  const TextViews first(texts);
  std::optional<TextViews> second;
  if (pairs) second.emplace(*pairs);
  const std::vector<std::uint64_t> ends[2] = {CopyNumbers(text_words), CopyNumbers(pair_words)};
  if (text_words) options.words[0] = &ends[0];
  if (pair_words) options.words[1] = &ends[1];
  std::optional<TokenRows> rows;
  std::optional<std::size_t> columns;
  {
    py::gil_scoped_release release;
    first.Check("text");
    if (second) second->Check("pair");
    rows.emplace(tokenizer, first.get(), second ? &second->get() : nullptr, options, threads);
    if (padded) columns = rows->Width(width, multiple);
  }
  const py::tuple arrays = !padded ? FlatArrays(*rows, threads)
                           : wide  ? PaddedArrays<std::int64_t>(*rows, *columns, threads)
                                   : PaddedArrays<std::int32_t>(*rows, *columns, threads);
  if (!layout) return arrays;
  py::object samples = py::none(), second_sizes = py::none();
  if (stride) samples = OfRows(*rows, [&](std::size_t row) { return rows->sample(row); });
  if (pairs) second_sizes = OfRows(*rows, [&](std::size_t row) { return rows->text_size(row, 1); });
  const py::tuple sizes = py::make_tuple(
      samples, OfRows(*rows, [&](std::size_t row) { return rows->text_size(row, 0); }),
      second_sizes);
  return arrays + sizes +
         (wide ? ColumnArrays<std::int64_t>(*rows, columns, spans, special, words, threads)
               : ColumnArrays<std::int32_t>(*rows, columns, spans, special, words, threads));
}

// FindWords.
template <typename T>
py::array_t<std::int32_t> WordNumbers(const Tokenizer& tokenizer, const Flat<T>& ids,
                                      const Flat<std::int64_t>& starts,
                                      const Flat<std::int64_t>& places, bool special,
                                      const Flat<std::int64_t>& firsts, const Numbers& seconds,
                                      int threads) {
  const auto rows = starts.size();
  if (firsts.size() != rows || places.size() != rows + 1 || (seconds && seconds->size() != rows)) {
    throw std::invalid_argument("every row needs the sizes of its texts");
  }
  RowIds<T> row_ids;
  row_ids.ids = ids.data();
  row_ids.size = static_cast<std::size_t>(ids.size());
  row_ids.rows = static_cast<std::size_t>(rows);
  row_ids.starts = starts.data();
  row_ids.places = places.data();
  row_ids.special = special;
  row_ids.firsts = firsts.data();
  row_ids.seconds = seconds ? seconds->data() : nullptr;
  std::vector<std::int32_t> words;
  {
    py::gil_scoped_release release;
    words = FindWords(tokenizer, row_ids, threads);
  }
  return Own(std::move(words));
}

// Numbers of words as a list, None where there is none.
py::list WordList(const Flat<std::int32_t>& words) {
  const std::int32_t* const data = words.data();
  return ListOf(static_cast<std::size_t>(words.size()), [data](std::size_t i) {
    return data[i] < 0 ? py::none().release().ptr() : PyLong_FromLong(data[i]);
  });
}

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

// Lists of Python integers as one array [rows, width], filled up with `fill`. None where a row is
// no list of at most `width` integers of 64 bits, for the caller to say why.
py::object FilledRows(const py::list& rows, const py::ssize_t width, const std::int64_t fill) {
  const auto count = static_cast<py::ssize_t>(rows.size());
  py::array_t<std::int64_t> array({count, width});
  std::int64_t* out = array.mutable_data();
  for (py::ssize_t number = 0; number < count; ++number, out += width) {
    PyObject* row = PyList_GET_ITEM(rows.ptr(), number);
    if (!PyList_CheckExact(row) || PyList_GET_SIZE(row) > width) return py::none();
    const py::ssize_t size = PyList_GET_SIZE(row);
    for (py::ssize_t i = 0; i < size; ++i) {
      PyObject* value = PyList_GET_ITEM(row, i);
      if (!PyLong_CheckExact(value)) return py::none();
      int overflow = 0;
      out[i] = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow != 0) return py::none();
    }
    std::fill(out + size, out + width, fill);
  }
  return array;
}

}  // namespace

void BindTokenRows(py::module_& m) {
  m.def("filled_rows", &FilledRows, py::arg("rows"), py::arg("width"), py::arg("fill"));
  m.def("word_list", &WordList, py::arg("words"));
  auto tokenizer = static_cast<py::class_<Tokenizer>>(m.attr("Tokenizer"));
  tokenizer.def("encode_list", &EncodeList, py::arg("text"), py::arg("pair"), py::arg("cls_sep"))
      .def("encode_rows", &EncodeRows, py::arg("texts"), py::arg("pairs"), py::kw_only(),
           py::arg("cls_sep"), py::arg("pad"), py::arg("truncation"), py::arg("max_length"),
           py::arg("padded"), py::arg("width"), py::arg("multiple"), py::arg("wide"),
           py::arg("threads"), py::arg("layout") = false, py::arg("stride") = py::none(),
           py::arg("text_words") = py::none(), py::arg("pair_words") = py::none(),
           py::arg("spans") = false, py::arg("special") = false, py::arg("words") = false);
  const auto def_word_numbers = [&](auto word_numbers) {
    tokenizer.def("word_numbers", word_numbers, py::arg("ids").noconvert(), py::arg("starts"),
                  py::arg("places"), py::arg("special"), py::arg("firsts"), py::arg("seconds"),
                  py::arg("threads"));
  };
  def_word_numbers(&WordNumbers<std::int32_t>);
  def_word_numbers(&WordNumbers<std::int64_t>);
}

}  // namespace mvbert::python
