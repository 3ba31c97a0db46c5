// Python: pieces of words, and vocabularies.

#include "bindings.h"
#include "segmentation.h"
#include "vocab_learner.h"
#include "wordpiece.h"

namespace mvbert::python {
namespace {

std::vector<std::int32_t> Cut(const WordPiece& wordpiece, const py::object& word) {
  const TextView view(word);
  std::vector<std::int32_t> ids;
  wordpiece.Cut(view.get(), &ids);
  return ids;
}

py::tuple SegmentLexicon(const py::buffer& bytes, const Flat<std::uint64_t>& word_ends,
                         const WordPiece& wordpiece, int threads) {
  const BytesView view(bytes);
  const std::uint64_t* ends = word_ends.data();
  const auto words = static_cast<std::size_t>(word_ends.size());
  Segmentation segmentation;
  {
    const py::gil_scoped_release release;
    segmentation = mvbert::SegmentLexicon(view.get(), ends, words, wordpiece, threads);
  }
  return py::make_tuple(Own(std::move(segmentation.ends)), Own(std::move(segmentation.ids)));
}

py::tuple LearnVocab(const py::buffer& bytes, const Flat<std::uint64_t>& ends,
                     const Flat<std::uint64_t>& counts, std::size_t size, double coverage,
                     int threads) {
  const BytesView view(bytes);
  if (ends.ndim() != 1 || counts.ndim() != 1 || ends.size() != counts.size()) {
    throw std::invalid_argument("ends and counts must be flat and equally long, got " +
                                std::to_string(ends.size()) + " ends and " +
                                std::to_string(counts.size()) + " counts");
  }
  LearnOptions options;
  options.size = size;
  options.coverage = coverage;
  options.threads = threads;
  // The caller holds the buffer and both arrays until the call returns.
  const std::uint64_t* word_ends = ends.data();
  const std::uint64_t* word_counts = counts.data();
  const auto words = static_cast<std::size_t>(ends.size());
  LearnedVocab vocab;
  {
    const py::gil_scoped_release release;
    vocab = mvbert::LearnVocab(view.get(), word_ends, word_counts, words, options);
  }
  return py::make_tuple(vocab.pieces, vocab.uses, vocab.alphabet, vocab.threshold);
}

}  // namespace

void BindVocab(py::module_& m) {
  py::class_<WordPiece, std::shared_ptr<WordPiece>>(m, "WordPiece")
      .def(py::init<std::vector<std::string>, std::int32_t, int>(), py::arg("pieces"),
           py::arg("unk_id"), py::arg("max_chars") = 100)
      .def("cut", &Cut, py::arg("word"), "The ids of one word.")
      .def("__len__", &WordPiece::size);
  m.def("segment_lexicon", &SegmentLexicon, py::arg("bytes"), py::arg("word_ends"),
        py::arg("wordpiece"), py::arg("threads"));
  m.def("learn_vocab", &LearnVocab, py::arg("bytes"), py::arg("ends"), py::arg("counts"),
        py::arg("size"), py::arg("coverage"), py::arg("threads"),
        "(pieces, uses, alphabet, threshold): exactly `size` pieces learned top-down.");
}

}  // namespace mvbert::python
