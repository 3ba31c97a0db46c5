// Runs text through corpus builder, lexicon, vocabulary learner and segmentation without Python,
// for sanitizers: with many workers, small blocks, text in small steps, pauses and restored
// builders, all must come out as with one worker and one block. Exit status 0 if all is well.
//
// What a corpus must be is tested against the plain Python definition in test_lexicon.py and
// ../test_corpus.py, what a vocabulary must be in test_vocab_learner.py.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "corpus_builder.h"
#include "lexicon.h"
#include "philox.h"
#include "segmentation.h"
#include "vocab_learner.h"
#include "wordpiece.h"

namespace {

void Require(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "corpus_check: %s\n", what.c_str());
  std::exit(1);
}

// Documents of words of all lengths and some alphabets, awkward white space, one very long
// document.
std::string MakeText(std::uint32_t documents) {
  static const char* const kLetters[] = {"a",      "e",      "s", "t",     "n",
                                         "\u00e9", "\u4e2d", "9", "\u0301"};
  static const char* const kSpaces[] = {" ", "\n", "\t", "\r\n", "  ", ", ", "\u00a0", "\u200b "};
  std::string text = "\ufeff";
  for (std::uint32_t d = 0; d < documents; ++d) {
    const std::uint32_t words = d == documents / 2 ? 30000 : d % 60;
    for (std::uint32_t w = 0; w < words; ++w) {
      const auto bits = mvbert::Philox4x32({w, d, 0, 0}, {7, 0});
      // Few of them again and again, and every fiftieth new.
      const std::uint32_t name = bits[0] % 50 ? bits[0] % 300 : bits[0] % 100000;
      std::uint32_t length = 1 + name % 11;
      if (bits[1] % 3000 == 0) length = 200;  // over what is stored
      std::uint32_t state = name * 2654435761u + 1;
      for (std::uint32_t i = 0; i < length; ++i) {
        state = state * 1664525u + 1013904223u;
        text += kLetters[(state >> 16) % (bits[1] % 20 ? 5 : 9)];
      }
      text += kSpaces[bits[2] % 40 < 33 ? 0 : bits[2] % 8];
    }
    text += d % 7 ? "\n\n" : "\n \t\r\n\n";
  }
  return text;
}

// A corpus with final ids.
struct Corpus {
  std::vector<std::uint32_t> train, heldout;
  std::string bytes;
  std::vector<std::uint64_t> ends, counts;
  mvbert::CorpusTotals totals;

  bool operator==(const Corpus& other) const {
    const auto& a = totals;
    const auto& b = other.totals;
    return train == other.train && heldout == other.heldout && bytes == other.bytes &&
           ends == other.ends && counts == other.counts && a.bytes == b.bytes &&
           a.documents == b.documents && a.train_documents == b.train_documents &&
           a.heldout_documents == b.heldout_documents && a.train_words == b.train_words &&
           a.heldout_words == b.heldout_words;
  }
};

void Take(mvbert::CorpusBuilder* builder, Corpus* corpus) {
  const mvbert::Streams taken = builder->Take();
  for (const auto& ids : taken.train) {
    corpus->train.insert(corpus->train.end(), ids.begin(), ids.end());
  }
  for (const auto& ids : taken.heldout) {
    corpus->heldout.insert(corpus->heldout.end(), ids.begin(), ids.end());
  }
}

void Finish(mvbert::CorpusBuilder* builder, Corpus* corpus) {
  builder->Flush();
  Take(builder, corpus);
  const mvbert::FinalLexicon lexicon(builder->lexicon());
  corpus->bytes.assign(lexicon.bytes.begin(), lexicon.bytes.end());
  corpus->ends = lexicon.ends;
  corpus->counts = lexicon.counts;
  for (auto* ids : {&corpus->train, &corpus->heldout}) {
    for (std::uint32_t& id : *ids) id = lexicon.final_ids[id];
  }
  corpus->totals = builder->totals();
}

mvbert::CorpusOptions Options(int threads, std::size_t block_bytes) {
  mvbert::CorpusOptions options;
  options.heldout_share = 0.2;
  options.seed = 3;
  options.threads = threads;
  options.block_bytes = block_bytes;
  return options;
}

Corpus Build(std::string_view text, int threads, std::size_t block_bytes, std::size_t step) {
  Corpus corpus;
  mvbert::CorpusBuilder builder(Options(threads, block_bytes));
  builder.BeginSource(0, mvbert::Destination::kByDraw);
  for (std::size_t at = 0; at < text.size(); at += step) {
    builder.AddText(text.substr(at, step));
    Take(&builder, &corpus);
  }
  Finish(&builder, &corpus);
  return corpus;
}

// Stops now and then, throws the builder away, and goes on with a new one from its state.
Corpus BuildInParts(std::string_view text, int threads, std::size_t part, int* pauses) {
  Corpus corpus;
  std::size_t at = 0;
  std::string words;
  mvbert::CorpusTotals totals;
  while (true) {
    mvbert::CorpusBuilder builder(Options(threads, 2000));
    builder.Restore(words, corpus.train.data(), corpus.train.size(), totals);
    builder.BeginSource(0, mvbert::Destination::kByDraw, at);
    const std::size_t end = std::min(text.size(), at + part);
    builder.AddText(text.substr(at, end - at));
    std::size_t next = end;
    mvbert::CorpusBuilder::PausePoint point;
    while (next < text.size() && !builder.Pause(&point)) {
      builder.AddText(text.substr(next, 1000));
      next = std::min(text.size(), next + 1000);
      Take(&builder, &corpus);
    }
    if (next == text.size()) {
      Finish(&builder, &corpus);
      return corpus;
    }
    ++*pauses;
    Take(&builder, &corpus);
    Require(point.offset > at, "a pause must get further");
    at = point.offset;
    totals = builder.totals();
    totals.documents = point.documents;
    totals.bytes = point.bytes;
    words = builder.lexicon().Lines(1);
  }
}

void CheckErrors(const std::string& text) {
  for (const std::size_t at : {std::size_t{0}, text.size() / 3, text.size() - 3}) {
    std::string bad = text;
    bad[at] = '\xff';
    bool thrown = false;
    try {
      Build(bad, 4, 1000, 777);
    } catch (const mvbert::NotUtf8& error) {
      thrown = error.source == 0 && error.offset <= at && error.offset + 4 > at;
    }
    Require(thrown, "the byte that is not UTF-8 was not named");
  }
  // A builder that is dropped with work under way.
  mvbert::CorpusBuilder builder(Options(3, 500));
  builder.BeginSource(0, mvbert::Destination::kTrain);
  builder.AddText(text);
}

void CheckLexicon() {
  const auto refused = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  mvbert::Lexicon lexicon;
  lexicon.Intern("word", mvbert::HashWord("word"));
  const std::uint32_t stream[] = {1, 0, 1}, outside[] = {2};
  lexicon.CountStream(stream, 3);
  lexicon.UncountStream(stream, 1);
  Require(lexicon.count(0) == 1 && lexicon.count(1) == 1, "wrong counts of a stream");
  Require(refused([&] { lexicon.CountStream(outside, 1); }), "an id outside was counted");
  Require(refused([&] { lexicon.UncountStream(outside, 1); }), "an id outside was taken back");
  Require(refused([&] { lexicon.UncountStream(stream, 3); }), "more was taken back than counted");
  Require(lexicon.Lines(0) == "\nword\n" && lexicon.Lines(1) == "word\n", "wrong lines");
}

void CheckLearnerAndSegmentation(const Corpus& corpus) {
  mvbert::LearnOptions options;
  options.size = 120;
  options.threads = 1;
  const std::size_t words = corpus.ends.size();
  const mvbert::LearnedVocab one =
      mvbert::LearnVocab(corpus.bytes, corpus.ends.data(), corpus.counts.data(), words, options);
  Require(one.pieces.size() == options.size, "the size must be exact");
  const mvbert::WordPiece wordpiece(one.pieces, 1);
  const mvbert::Segmentation cut =
      mvbert::SegmentLexicon(corpus.bytes, corpus.ends.data(), words, wordpiece, 1);
  Require(cut.ends.size() == words && cut.ends.back() == cut.ids.size(), "every word has an end");
  for (const int threads : {2, 5, 16}) {
    options.threads = threads;
    const mvbert::LearnedVocab many =
        mvbert::LearnVocab(corpus.bytes, corpus.ends.data(), corpus.counts.data(), words, options);
    Require(many.pieces == one.pieces && many.uses == one.uses, "learning depends on threads");
    const mvbert::Segmentation again =
        mvbert::SegmentLexicon(corpus.bytes, corpus.ends.data(), words, wordpiece, threads);
    Require(again.ends == cut.ends && again.ids == cut.ids, "cutting depends on threads");
  }
}

}  // namespace

int main() {
  const std::string text = MakeText(400);
  const Corpus whole = Build(text, 1, text.size() * 2, text.size());
  Require(whole.totals.train_documents > 200 && whole.totals.heldout_documents > 20 &&
              whole.ends.size() > 500,
          "the text has become too plain to check anything");
  for (const int threads : {1, 2, 7}) {
    for (const std::size_t block : {std::size_t{64}, std::size_t{3000}, std::size_t{1} << 20}) {
      Require(Build(text, threads, block, 1013) == whole, "a corpus depends on blocks or threads");
    }
    int pauses = 0;
    Require(BuildInParts(text, threads, text.size() / 30, &pauses) == whole && pauses > 5,
            "a corpus depends on pauses");
  }
  CheckErrors(text);
  CheckLexicon();
  CheckLearnerAndSegmentation(whole);
  std::puts("corpus_check: all corpora agree");
}
