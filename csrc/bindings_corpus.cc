// Python: text to word ids, and lexicons.

#include <tuple>

#include "bindings.h"
#include "corpus_builder.h"
#include "lexicon.h"

namespace mvbert::python {
namespace {

std::unique_ptr<CorpusBuilder> MakeCorpusBuilder(bool lowercase, bool strip_accents,
                                                 double heldout_share, std::uint64_t seed,
                                                 bool replace, int threads,
                                                 std::size_t block_bytes) {
  CorpusOptions options;
  options.split.lowercase = lowercase;
  options.split.strip_accents = strip_accents;
  options.heldout_share = heldout_share;
  options.seed = seed;
  options.replace = replace;
  options.threads = threads;
  options.block_bytes = block_bytes;
  return std::make_unique<CorpusBuilder>(options);
}

void BeginSource(CorpusBuilder& builder, std::uint32_t source, const std::string& part,
                 std::uint64_t offset) {
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

void AddText(CorpusBuilder& builder, const py::buffer& text) {
  const BytesView view(text);
  const py::gil_scoped_release release;
  builder.AddText(view.get());
}

void AddDocuments(CorpusBuilder& builder, const py::buffer& text, const Flat<std::uint64_t>& ends) {
  const BytesView view(text);
  const py::gil_scoped_release release;
  builder.AddDocuments(view.get(), ends.data(), static_cast<std::size_t>(ends.size()));
}

py::tuple Take(CorpusBuilder& builder) {
  Streams streams;
  {
    const py::gil_scoped_release release;
    streams = builder.Take();
  }
  py::list train, heldout;
  for (auto& ids : streams.train) train.append(Own(std::move(ids)));
  for (auto& ids : streams.heldout) heldout.append(Own(std::move(ids)));
  return py::make_tuple(train, heldout);
}

py::dict Totals(const CorpusBuilder& builder) {
  const CorpusTotals& totals = builder.totals();
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
py::object Pause(CorpusBuilder& builder) {
  CorpusBuilder::PausePoint point{};
  bool paused = false;
  {
    const py::gil_scoped_release release;
    paused = builder.Pause(&point);
  }
  if (!paused) return py::none();
  return py::make_tuple(point.offset, point.documents, point.bytes);
}

// The words from an id on, each followed by a line break.
py::bytes NewWords(CorpusBuilder& builder, std::uint32_t first) {
  return builder.lexicon().Lines(first);
}

void Restore(CorpusBuilder& builder, const py::buffer& words, const Flat<std::uint32_t>& train,
             const py::dict& values) {
  const BytesView view(words);
  CorpusTotals totals;
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
  builder.Restore(view.get(), ids, size, totals);
}

void CountIds(CorpusBuilder& builder, const Flat<std::uint32_t>& ids) {
  const py::gil_scoped_release release;
  builder.lexicon().CountStream(ids.data(), static_cast<std::size_t>(ids.size()));
}

// The lexicon in final order and the map to it; the `moved` words leave the train part first.
py::tuple LexiconArrays(CorpusBuilder& builder, const Flat<std::uint32_t>& moved) {
  std::optional<FinalLexicon> result;
  {
    const py::gil_scoped_release release;
    builder.lexicon().UncountStream(moved.data(), static_cast<std::size_t>(moved.size()));
    result.emplace(builder.lexicon());
  }
  return py::make_tuple(Own(std::move(result->bytes)), Own(std::move(result->ends)),
                        Own(std::move(result->counts)), Own(std::move(result->final_ids)));
}

py::array_t<std::uint32_t> HeldoutDraws(std::uint64_t seed, std::uint64_t documents) {
  std::vector<std::uint32_t> draws;
  {
    const py::gil_scoped_release release;
    draws = HeldOutDraw::Draws(seed, documents);
  }
  return Own(std::move(draws));
}

}  // namespace

void BindCorpus(py::module_& m) {
  static PyObject* not_utf8 =
      py::exception<NotUtf8>(m, "NotUtf8", PyExc_ValueError).release().ptr();
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const NotUtf8& e) {
      PyErr_SetObject(not_utf8, py::make_tuple(e.source, e.offset).ptr());
    }
  });
  py::class_<CorpusBuilder>(m, "CorpusBuilder")
      .def(py::init(&MakeCorpusBuilder), py::kw_only(), py::arg("lowercase"),
           py::arg("strip_accents") = true, py::arg("heldout_share"), py::arg("seed"),
           py::arg("replace"), py::arg("threads"), py::arg("block_bytes") = 1 << 20)
      .def("begin_source", &BeginSource, py::arg("source"), py::arg("part"), py::arg("offset") = 0)
      .def("add_text", &AddText, py::arg("text"))
      .def("add_documents", &AddDocuments, py::arg("text"), py::arg("ends"))
      .def("flush", &CorpusBuilder::Flush, py::call_guard<py::gil_scoped_release>())
      .def("pause", &Pause)
      .def("new_words", &NewWords, py::arg("first"))
      .def("restore", &Restore, py::arg("words"), py::arg("train"), py::arg("totals"))
      .def("take", &Take)
      .def("totals", &Totals)
      .def("count", &CountIds, py::arg("ids"))
      .def("lexicon", &LexiconArrays, py::arg("moved"));
  m.def("heldout_draws", &HeldoutDraws, py::arg("seed"), py::arg("documents"));
}

}  // namespace mvbert::python
