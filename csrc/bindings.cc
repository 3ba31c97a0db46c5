// The Python face of the core: convert, release the GIL, call. One section a subject, one table of
// definitions at the bottom.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"

namespace py = pybind11;

namespace {

// ---- words and wordpiece ----------------------------------------------------------------

// ---- lexicon ----------------------------------------------------------------------------

// ---- vocabulary learner -----------------------------------------------------------------

// ---- mixer ------------------------------------------------------------------------------

}  // namespace

PYBIND11_MODULE(_tokenizer, m) {
  m.doc() = "C++ core of mvbert: words, WordPiece, lexicon, vocabulary learner, mixed rows.";
  m.attr("__version__") = mvbert::kVersion;
  m.attr("source_hash") = mvbert::kSourceHash;

  // words and wordpiece

  // lexicon

  // vocabulary learner

  // mixer
}
