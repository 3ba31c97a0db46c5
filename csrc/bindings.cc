// The Python module.

#include "bindings.h"

#include <string>

#include "build_info.h"
#include "unicode.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of mvbert: words, WordPiece, lexicon, vocabulary learner, mixed rows.";
  m.attr("__version__") = mvbert::kVersion;
  m.attr("source_hash") = mvbert::kSourceHash;
  m.attr("unicode_version") = std::string(mvbert::UnicodeVersion());
  mvbert::python::BindVocab(m);
  mvbert::python::BindTokenizer(m);
  mvbert::python::BindTokenRows(m);
  mvbert::python::BindCorpus(m);
  mvbert::python::BindRows(m);
}
