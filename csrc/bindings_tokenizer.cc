// Python: texts to words and to ids.

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "ascii_run.h"
#include "bindings.h"
#include "tokenizer.h"
#include "wordpiece.h"
#include "words.h"

namespace mvbert::python {
namespace {

const AsciiRunChoice& AsciiRunNamed(const std::string& name) {
  for (const auto& choice : AsciiRunChoices()) {
    if (name == choice.name) return choice;
  }
  throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const auto& choice : AsciiRunChoices()) names.emplace_back(choice.name);
  return names;
}

// Calls call(utf8) with the checked UTF-8 of a text, without the GIL.
template <typename Call>
void WithText(const py::object& text, Call&& call) {
  const TextView view(text, TextView::kUnchecked);
  py::gil_scoped_release release;
  view.Check();
  call(view.get());
}

py::list Split(const py::object& text, bool lowercase,
               const std::optional<std::string>& instruction_set, bool strip_accents) {
  const WordSplitter splitter({lowercase, strip_accents}, instruction_set
                                                              ? AsciiRunNamed(*instruction_set)
                                                              : FastestAsciiRun());
  Words words;
  WithText(text, [&](std::string_view utf8) { splitter.Split(utf8, &words); });
  return ListOf(words.ends.size(), [&](std::size_t i) {
    const std::uint32_t begin = i == 0 ? 0 : words.ends[i - 1];
    return PyUnicode_DecodeUTF8(words.bytes.data() + begin, words.ends[i] - begin, nullptr);
  });
}

py::object Utf8Error(const py::buffer& data) {
  const BytesView view(data);
  std::size_t at = 0;
  {
    py::gil_scoped_release release;
    at = Utf8ErrorOffset(view.get());
  }
  if (at == kNoError) return py::none();
  return py::int_(at);
}

// A numpy array that owns the buffer's memory.
py::array_t<std::int32_t> TakeIds(IdBuffer* ids) {
  const auto size = static_cast<py::ssize_t>(ids->size());
  std::int32_t* data = ids->Release();
  const py::capsule owner(data == nullptr ? std::malloc(1) : data, &std::free);
  return py::array_t<std::int32_t>({size}, {sizeof(std::int32_t)}, data, owner);
}

TextOptions MakeTextOptions(bool find_special, std::uint64_t threshold = 0,
                            std::uint64_t seed = 0) {
  TextOptions options;
  options.find_special = find_special;
  options.coin = {threshold, seed};
  return options;
}

std::unique_ptr<Tokenizer> MakeTokenizer(
    bool lowercase, bool strip_accents, std::shared_ptr<WordPiece> teacher,
    std::shared_ptr<WordPiece> student,
    const std::vector<std::tuple<std::string, std::int32_t, bool>>& special) {
  std::vector<SpecialPiece> pieces;
  for (const auto& [piece, id, normalized] : special) pieces.push_back({piece, id, normalized});
  return std::make_unique<Tokenizer>(SplitOptions{lowercase, strip_accents}, std::move(teacher),
                                     std::move(student), pieces);
}

// The ids of texts, flat, and offsets: text i has ids[offsets[i] : offsets[i + 1]].
py::tuple EncodeTexts(const Tokenizer& tokenizer, const py::iterable& texts, bool find_special,
                      std::uint64_t threshold, std::uint64_t seed, std::uint64_t first_number,
                      int threads) {
  const TextViews views(texts);
  Encoding encoding;
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

py::array_t<std::int32_t> EncodeLong(const Tokenizer& tokenizer, const py::buffer& data,
                                     bool find_special, int threads) {
  const BytesView view(data);
  IdBuffer ids;
  {
    py::gil_scoped_release release;
    CheckUtf8(view.get());
    tokenizer.EncodeLong(view.get(), find_special, threads, &ids);
  }
  return TakeIds(&ids);
}

// ids, where each word's ids begin, whether the student cut it.
py::tuple EncodeWords(const Tokenizer& tokenizer, const py::object& text, bool find_special,
                      std::uint64_t threshold, std::uint64_t seed, std::uint64_t number) {
  const TextOptions options = MakeTextOptions(find_special, threshold, seed);
  IdBuffer ids;
  WordMap words;
  WithText(text, [&](std::string_view utf8) {
    tokenizer.EncodeWords(utf8, options, number, &ids, &words);
  });
  return py::make_tuple(TakeIds(&ids), CopyArray<std::int32_t>(words.starts),
                        CopyArray<bool>(words.from_student));
}

// ids, and spans [n, 2] in characters of the text.
py::tuple EncodeSpans(const Tokenizer& tokenizer, const py::object& text, bool find_special) {
  IdBuffer ids, spans;
  WithText(text,
           [&](std::string_view utf8) { tokenizer.EncodeSpans(utf8, find_special, &ids, &spans); });
  return py::make_tuple(TakeIds(&ids), TakeIds(&spans).reshape({-1, 2}));
}

}  // namespace

void BindTokenizer(py::module_& m) {
  m.def("split", &Split, py::arg("text"), py::arg("lowercase") = true,
        py::arg("instruction_set") = py::none(), py::arg("strip_accents") = true,
        "The normalised words of a str or of UTF-8 bytes.");
  m.def("instruction_sets", &InstructionSets,
        "The ways to read ASCII that this machine has; the last is used unless another is named.");
  m.def("utf8_error", &Utf8Error, py::arg("data"),
        "Offset of the first byte that is not well-formed UTF-8, or None.");
  py::class_<Tokenizer, std::shared_ptr<Tokenizer>>(m, "Tokenizer")
      .def(py::init(&MakeTokenizer), py::kw_only(), py::arg("lowercase"),
           py::arg("strip_accents") = true, py::arg("teacher"), py::arg("student") = nullptr,
           py::arg("special") = std::vector<std::tuple<std::string, std::int32_t, bool>>())
      .def("encode_texts", &EncodeTexts, py::arg("texts"), py::arg("find_special"),
           py::arg("threshold") = 0, py::arg("seed") = 0, py::arg("first_number") = 0,
           py::arg("threads") = 1)
      .def("encode_long", &EncodeLong, py::arg("data"), py::arg("find_special"),
           py::arg("threads") = 1)
      .def("encode_words", &EncodeWords, py::arg("text"), py::arg("find_special"),
           py::arg("threshold") = 0, py::arg("seed") = 0, py::arg("number") = 0)
      .def("encode_spans", &EncodeSpans, py::arg("text"), py::arg("find_special"))
      .def("forget_words", &Tokenizer::ForgetWords);
}

}  // namespace mvbert::python
