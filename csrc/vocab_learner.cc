#include "vocab_learner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "share.h"
#include "unicode.h"

namespace mvbert {
namespace {

constexpr std::size_t kCodePoints = 0x110000;
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

bool IsLineOrBlank(char32_t code) { return code == ' ' || (code >= '\t' && code <= '\r'); }

// Words as flat symbols: symbol s is the s-th most frequent character. Word w is
// symbols[begin[w], begin[w + 1]) and occurs counts[w] times. Only words that take part.
struct Words {
  std::vector<std::uint32_t> symbols;
  std::vector<std::size_t> begin = {0};
  std::vector<std::uint64_t> counts;
  std::vector<std::uint32_t> code_points;  // of each symbol
  std::vector<bool> initial, inner;        // whether a symbol begins a word, stands inside one
  std::uint64_t total = 0;

  std::size_t size() const { return counts.size(); }
};

[[noreturn]] void ThrowWord(std::size_t index, const std::string& what) {
  throw std::invalid_argument("word " + std::to_string(index) + " " + what);
}

// Decodes the words, chooses the covered alphabet and drops the words that take no part.
Words ReadWords(std::string_view bytes, const std::uint64_t* ends, const std::uint64_t* counts,
                std::size_t count, double coverage) {
  Words all;
  std::vector<std::uint64_t> occurrences(kCodePoints, 0);
  std::uint64_t occurrences_total = 0;
  std::uint64_t start = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (ends[i] < start || ends[i] > bytes.size()) {
      ThrowWord(i, "ends at byte " + std::to_string(ends[i]) + ", outside [" +
                       std::to_string(start) + ", " + std::to_string(bytes.size()) + "]");
    }
    const std::string_view word = bytes.substr(start, ends[i] - start);
    start = ends[i];
    if (word.empty() || counts[i] == 0) continue;
    if (std::find(std::begin(kSpecialTokens), std::end(kSpecialTokens), word) !=
        std::end(kSpecialTokens)) {
      continue;
    }
    if (word.size() > 2 && word.substr(0, 2) == "##") {
      ThrowWord(i,
                "begins with '##', the mark of inner pieces: cut text with the BERT splitter, "
                "which isolates '#'");
    }
    const std::size_t error = Utf8ErrorOffset(word);
    if (error != kNoError) ThrowWord(i, "is not UTF-8 at its byte " + std::to_string(error));
    const std::size_t first = all.symbols.size();
    for (const char* at = word.data(); at != word.data() + word.size();) {
      const char32_t code = DecodeUtf8(&at);
      if (IsLineOrBlank(code)) ThrowWord(i, "holds white space: a vocab.txt cannot");
      all.symbols.push_back(code);
    }
    if (all.symbols.size() - first > kMaxWordCharacters) {
      all.symbols.resize(first);
      continue;
    }
    for (std::size_t p = first; p < all.symbols.size(); ++p) {
      occurrences[all.symbols[p]] += counts[i];
      occurrences_total += counts[i];
    }
    all.begin.push_back(all.symbols.size());
    all.counts.push_back(counts[i]);
  }

  std::vector<std::uint32_t> order;
  for (std::uint32_t code = 0; code < kCodePoints; ++code) {
    if (occurrences[code]) order.push_back(code);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return occurrences[a] > occurrences[b];
  });
  const double target = std::ceil(coverage * static_cast<double>(occurrences_total));
  std::vector<std::uint32_t> symbol_of(kCodePoints, kNone);
  std::uint64_t covered = 0;
  Words words;
  for (std::uint32_t code : order) {
    if (static_cast<double>(covered) >= target) break;
    covered += occurrences[code];
    symbol_of[code] = static_cast<std::uint32_t>(words.code_points.size());
    words.code_points.push_back(code);
  }

  words.initial.resize(words.code_points.size());
  words.inner.resize(words.code_points.size());
  words.symbols.reserve(all.symbols.size());
  for (std::size_t w = 0; w < all.size(); ++w) {
    const std::size_t first = words.symbols.size();
    for (std::size_t p = all.begin[w]; p < all.begin[w + 1]; ++p) {
      words.symbols.push_back(symbol_of[all.symbols[p]]);
    }
    if (std::find(words.symbols.begin() + first, words.symbols.end(), kNone) !=
        words.symbols.end()) {
      words.symbols.resize(first);
      continue;
    }
    words.initial[words.symbols[first]] = true;
    for (std::size_t p = first + 1; p < words.symbols.size(); ++p) {
      words.inner[words.symbols[p]] = true;
    }
    words.begin.push_back(words.symbols.size());
    words.counts.push_back(all.counts[w]);
    words.total += all.counts[w];
  }
  return words;
}

// A word ending: the last `depth` symbols of `word`, and how often it is a whole word or the end of
// a longer one.
struct Suffix {
  std::uint32_t word, depth;
  std::uint64_t whole, proper;
};

// Finds the suffixes of two symbols or more that occur `floor` times or more. A suffix is at most
// as frequent as the shorter suffixes in it, so words are grouped by their last symbol, then by the
// one before it, and so on, and rare groups are not followed.
class SuffixFinder {
 public:
  SuffixFinder(const Words& words, std::uint64_t floor)
      : words_(words),
        floor_(floor),
        weight_(words.code_points.size()),
        number_(words.code_points.size()) {}

  // Visits `group`, words that share their last `depth` symbols.
  void Visit(const std::uint32_t* group, std::size_t count, std::uint32_t depth) {
    std::uint64_t whole = 0, proper = 0;
    std::vector<std::uint32_t> seen;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t w = group[i];
      const std::size_t end = words_.begin[w + 1];
      if (end - words_.begin[w] == depth) {
        whole += words_.counts[w];
        continue;
      }
      proper += words_.counts[w];
      const std::uint32_t symbol = words_.symbols[end - depth - 1];
      if (number_[symbol]++ == 0) seen.push_back(symbol);
      weight_[symbol] += words_.counts[w];
    }
    if (depth >= 2 && (whole >= floor_ || proper >= floor_)) {
      suffixes.push_back({group[0], depth, whole, proper});
    }
    // Symbols that continue get a part of `next`; number_ then holds where its next word goes.
    struct Part {
      std::uint32_t symbol;
      std::size_t begin, count;
    };
    std::vector<Part> parts;
    std::size_t size = 0;
    for (std::uint32_t symbol : seen) {
      if (weight_[symbol] >= floor_) {
        parts.push_back({symbol, size, number_[symbol]});
        size += number_[symbol];
        number_[symbol] = parts.back().begin;
      } else {
        number_[symbol] = kDropped;
      }
    }
    std::vector<std::uint32_t> next(size);
    for (std::size_t i = 0; size != 0 && i < count; ++i) {
      const std::uint32_t w = group[i];
      const std::size_t end = words_.begin[w + 1];
      if (end - words_.begin[w] == depth) continue;
      std::size_t& slot = number_[words_.symbols[end - depth - 1]];
      if (slot != kDropped) next[slot++] = w;
    }
    for (std::uint32_t symbol : seen) weight_[symbol] = number_[symbol] = 0;
    for (const Part& part : parts) Visit(next.data() + part.begin, part.count, depth + 1);
  }

  std::vector<Suffix> suffixes;

 private:
  static constexpr std::size_t kDropped = std::numeric_limits<std::size_t>::max();

  const Words& words_;
  const std::uint64_t floor_;
  std::vector<std::uint64_t> weight_;  // by symbol; all zero between visits
  std::vector<std::size_t> number_;
};

// Pieces and their prefixes as a tree. Node 0 is the root of word-initial pieces, node 1 of "##"
// pieces; a node's number is above its parent's.
class Trie {
 public:
  Trie() : slots_(1 << 10, Slot{kEmpty, 0}) {
    Add(0, 0);
    Add(0, 0);
    depth_[0] = depth_[1] = 0;
  }

  std::size_t size() const { return parent_.size(); }
  std::uint32_t parent(std::uint32_t node) const { return parent_[node]; }
  std::uint32_t symbol(std::uint32_t node) const { return symbol_[node]; }
  std::uint8_t depth(std::uint32_t node) const { return depth_[node]; }

  // The child of `node` by `symbol`, kNone if there is none.
  std::uint32_t Child(std::uint32_t node, std::uint32_t symbol) const {
    const std::uint64_t key = Key(node, symbol);
    for (std::size_t i = Hash(key) & (slots_.size() - 1);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].key == key) return slots_[i].node;
      if (slots_[i].key == kEmpty) return kNone;
    }
  }

  std::uint32_t ChildOrNew(std::uint32_t node, std::uint32_t symbol) {
    const std::uint32_t child = Child(node, symbol);
    if (child != kNone) return child;
    if (size() >= kNone) throw std::length_error("too many candidate pieces");
    if (size() * 2 > slots_.size()) Grow();
    const auto added = static_cast<std::uint32_t>(size());
    Add(node, symbol);
    Insert({Key(node, symbol), added});
    return added;
  }

 private:
  struct Slot {
    std::uint64_t key;
    std::uint32_t node;
  };
  static constexpr std::uint64_t kEmpty = std::numeric_limits<std::uint64_t>::max();

  static std::uint64_t Key(std::uint32_t node, std::uint32_t symbol) {
    return std::uint64_t{node} << 32 | symbol;
  }
  static std::size_t Hash(std::uint64_t key) {
    key *= 0x9E3779B97F4A7C15u;
    return static_cast<std::size_t>(key ^ key >> 32);
  }

  void Add(std::uint32_t parent, std::uint32_t symbol) {
    parent_.push_back(parent);
    symbol_.push_back(symbol);
    depth_.push_back(static_cast<std::uint8_t>(depth_.empty() ? 0 : depth_[parent] + 1));
  }

  void Insert(Slot slot) {
    std::size_t i = Hash(slot.key) & (slots_.size() - 1);
    while (slots_[i].key != kEmpty) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = slot;
  }

  void Grow() {
    std::vector<Slot> old(slots_.size() * 2, Slot{kEmpty, 0});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kEmpty) Insert(slot);
    }
  }

  std::vector<Slot> slots_;
  std::vector<std::uint32_t> parent_, symbol_;
  std::vector<std::uint8_t> depth_;
};

class Learner {
 public:
  Learner(Words words, std::size_t size, int threads)
      : words_(std::move(words)), size_(size), threads_(threads) {
    for (std::size_t s = 0; s < words_.code_points.size(); ++s) {
      alphabet_ += words_.initial[s] + words_.inner[s];
    }
    if (size_ < kSpecialTokenCount + alphabet_) {
      throw std::invalid_argument(
          "size " + std::to_string(size_) + " is below the alphabet of " +
          std::to_string(words_.code_points.size()) + " characters (" + std::to_string(alphabet_) +
          " pieces: alone or first, and inside words); use at least " +
          std::to_string(kSpecialTokenCount + alphabet_) + ", or lower coverage");
    }
    // A first guess that is seldom too high; EnsureFloor lowers it where it is.
    BuildCandidates(std::max<std::uint64_t>(1, words_.total / (8 * size_)));
  }

  LearnedVocab Run() {
    const std::size_t need = size_ - kSpecialTokenCount - alphabet_;
    std::vector<std::uint32_t> nodes;
    std::vector<std::uint64_t> uses;
    std::uint64_t threshold = words_.total;
    for (;;) {
      threshold = Search(need, threshold);
      nodes = Ranked(threshold);
      nodes.resize(need);
      uses = Uses(nodes);
      bool all_used = true;
      for (std::uint32_t node : nodes) {
        if (uses[node] == 0) {
          unused_.insert(Spell(node));
          all_used = false;
        }
      }
      if (all_used) break;
    }
    return Collect(nodes, uses, threshold);
  }

 private:
  // Per node, under the vocabulary at hand: the longest piece that is the node or a prefix of it.
  struct Match {
    std::uint32_t node;
    std::uint8_t length;
    std::uint8_t depth;  // of the node itself
  };

  // Finds every suffix that occurs `floor` times or more, puts them into the trie, and notes for
  // each symbol of each word the deepest node that the word's rest reaches.
  void BuildCandidates(std::uint64_t floor) {
    floor_ = floor;
    const std::size_t symbols = words_.code_points.size();
    std::vector<std::size_t> bucket(symbols + 1, 0);
    for (std::size_t w = 0; w < words_.size(); ++w) ++bucket[Last(w) + 1];
    for (std::size_t s = 0; s < symbols; ++s) bucket[s + 1] += bucket[s];
    std::vector<std::uint32_t> order(words_.size());
    std::vector<std::size_t> slot(bucket.begin(), bucket.end());
    for (std::size_t w = 0; w < words_.size(); ++w) {
      order[slot[Last(w)]++] = static_cast<std::uint32_t>(w);
    }
    std::vector<std::vector<Suffix>> suffixes(symbols);
    Share(symbols, threads_, [&](auto&& next) {
      SuffixFinder finder(words_, floor_);
      for (std::size_t s; next(&s);) {
        finder.Visit(order.data() + bucket[s], bucket[s + 1] - bucket[s], 1);
        suffixes[s] = std::exchange(finder.suffixes, {});
      }
    });

    trie_ = Trie();
    first_.clear();
    for (std::uint32_t s = 0; s < symbols; ++s) {
      if (words_.initial[s]) trie_.ChildOrNew(0, s);
      if (words_.inner[s]) trie_.ChildOrNew(1, s);
    }
    const auto insert = [&](const Suffix& suffix, std::uint32_t node, std::uint64_t count) {
      if (count < floor_) return;
      const std::size_t end = words_.begin[suffix.word + 1];
      for (std::size_t p = end - suffix.depth; p < end; ++p) {
        node = trie_.ChildOrNew(node, words_.symbols[p]);
      }
      first_.resize(trie_.size());
      first_[node] = count;
    };
    for (const std::vector<Suffix>& part : suffixes) {
      for (const Suffix& suffix : part) {
        insert(suffix, 0, suffix.whole);
        insert(suffix, 1, suffix.proper);
      }
    }
    first_.resize(trie_.size());
    sorted_first_.clear();
    for (std::uint64_t count : first_) {
      if (count) sorted_first_.push_back(count);
    }
    std::sort(sorted_first_.begin(), sorted_first_.end());

    reach_.resize(words_.symbols.size());
    ForRanges([&](std::size_t begin, std::size_t end, std::size_t) {
      for (std::size_t w = begin; w < end; ++w) {
        for (std::size_t start = words_.begin[w]; start < words_.begin[w + 1]; ++start) {
          std::uint32_t node = start == words_.begin[w] ? 0 : 1;
          for (std::size_t p = start; p < words_.begin[w + 1]; ++p) {
            const std::uint32_t child = trie_.Child(node, words_.symbols[p]);
            if (child == kNone) break;
            node = child;
          }
          reach_[start] = node;
        }
      }
    });
  }

  // Calls body(begin, end, part) for a range of the words a thread.
  template <typename Body>
  void ForRanges(const Body& body) const {
    ShareRanges(words_.size(), static_cast<std::size_t>(threads_), threads_, body);
  }

  std::uint32_t Last(std::size_t w) const { return words_.symbols[words_.begin[w + 1] - 1]; }

  // The matches under a vocabulary of all single characters and the nodes that `keep` says.
  template <typename Keep>
  std::vector<Match> Matches(const Keep& keep) const {
    std::vector<Match> matches(trie_.size());
    for (std::uint32_t node = 2; node < trie_.size(); ++node) {
      const std::uint8_t depth = trie_.depth(node);
      if (depth == 1 || keep(node)) {
        matches[node] = {node, depth, depth};
      } else {
        matches[node] = matches[trie_.parent(node)];
        matches[node].depth = depth;
      }
    }
    return matches;
  }

  // Adds up visit(match, rest, count) over all pieces of all words, where `rest` is the length of
  // the word from the piece on; visit returns the node to credit with the word's count, kNone for
  // no one.
  template <typename Visit>
  std::vector<std::uint64_t> CutAndCount(const std::vector<Match>& matches, Visit visit) const {
    std::vector<std::vector<std::uint64_t>> parts(threads_);
    ForRanges([&](std::size_t begin, std::size_t end, std::size_t part) {
      std::vector<std::uint64_t> counts(trie_.size());
      for (std::size_t w = begin; w < end; ++w) {
        const std::size_t stop = words_.begin[w + 1];
        for (std::size_t p = words_.begin[w]; p < stop;) {
          const Match& match = matches[reach_[p]];
          const std::uint32_t node = visit(match, reach_[p], stop - p);
          if (node != kNone) counts[node] += words_.counts[w];
          p += match.length;
        }
      }
      parts[part] = std::move(counts);
    });
    for (int thread = 1; thread < threads_; ++thread) {
      for (std::size_t i = 0; i < trie_.size(); ++i) parts[0][i] += parts[thread][i];
    }
    return std::move(parts[0]);
  }

  // The last round's count of every node, at `threshold`; kept are those that reach it.
  std::vector<std::uint64_t> Learn(std::uint64_t threshold) const {
    std::vector<std::uint64_t> counts = first_;
    for (int round = 1; round < kLearnerRounds; ++round) {
      const auto keep = [&](std::uint32_t node) { return counts[node] >= threshold; };
      counts = CutAndCount(Matches(keep),
                           [](const Match& match, std::uint32_t reached, std::size_t rest) {
                             return match.depth == rest ? reached : kNone;
                           });
    }
    return counts;
  }

  // Nodes of two symbols or more that reach `threshold` and are not known as unused, unordered.
  std::vector<std::uint32_t> Kept(const std::vector<std::uint64_t>& counts,
                                  std::uint64_t threshold) const {
    std::vector<std::uint32_t> nodes;
    for (std::uint32_t node = 2; node < trie_.size(); ++node) {
      if (trie_.depth(node) < 2 || counts[node] < threshold) continue;
      if (unused_.empty() || unused_.count(Spell(node)) == 0) nodes.push_back(node);
    }
    return nodes;
  }

  // The same by descending count, ties by spelling.
  std::vector<std::uint32_t> Ranked(std::uint64_t threshold) const {
    const std::vector<std::uint64_t> counts = Learn(threshold);
    std::vector<std::pair<std::string, std::uint32_t>> spelled;
    for (std::uint32_t node : Kept(counts, threshold)) spelled.emplace_back(Spell(node), node);
    std::sort(spelled.begin(), spelled.end(), [&](const auto& a, const auto& b) {
      const std::uint64_t count_a = counts[a.second], count_b = counts[b.second];
      return count_a != count_b ? count_a > count_b : a.first < b.first;
    });
    std::vector<std::uint32_t> nodes;
    for (const auto& [piece, node] : spelled) nodes.push_back(node);
    return nodes;
  }

  // The largest threshold up to `high` that keeps at least `need` usable pieces, by bisection.
  std::uint64_t Search(std::size_t need, std::uint64_t high) {
    if (need == 0) return high;
    if (Enough(high, need)) return high;
    std::uint64_t low = 0;
    --high;
    while (low < high) {
      const std::uint64_t middle = low + (high - low + 1) / 2;
      if (Enough(middle, need)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    if (low == 0) {
      const std::size_t most = Kept(Learn(1), 1).size() + alphabet_ + kSpecialTokenCount;
      throw std::invalid_argument(
          "size " + std::to_string(size_) + " is above the " + std::to_string(most) +
          " pieces that these words give; use a smaller size, or more text");
    }
    return low;
  }

  bool Enough(std::uint64_t threshold, std::size_t need) {
    if (threshold < floor_) BuildCandidates(std::max<std::uint64_t>(1, threshold / 2));
    // No round counts a suffix more often than the first: often that is answer enough.
    const auto at = std::lower_bound(sorted_first_.begin(), sorted_first_.end(), threshold);
    if (static_cast<std::size_t>(sorted_first_.end() - at) < need) return false;
    return Kept(Learn(threshold), threshold).size() >= need;
  }

  // How often each node is used when all words are cut with the single characters and `pieces`.
  std::vector<std::uint64_t> Uses(const std::vector<std::uint32_t>& pieces) const {
    std::vector<bool> in_vocab(trie_.size());
    for (std::uint32_t node : pieces) in_vocab[node] = true;
    const auto keep = [&](std::uint32_t node) { return in_vocab[node]; };
    return CutAndCount(Matches(keep),
                       [](const Match& match, std::uint32_t, std::size_t) { return match.node; });
  }

  std::string Spell(std::uint32_t node) const {
    std::vector<std::uint32_t> symbols;
    for (; node > 1; node = trie_.parent(node)) symbols.push_back(trie_.symbol(node));
    std::string piece = node == 1 ? "##" : "";
    for (auto s = symbols.rbegin(); s != symbols.rend(); ++s) {
      char utf8[4];
      piece.append(utf8, EncodeUtf8(words_.code_points[*s], utf8));
    }
    return piece;
  }

  LearnedVocab Collect(std::vector<std::uint32_t> nodes, const std::vector<std::uint64_t>& uses,
                       std::uint64_t threshold) const {
    for (std::uint32_t node = 2; node < trie_.size(); ++node) {
      if (trie_.depth(node) == 1) nodes.push_back(node);
    }
    std::vector<std::pair<std::uint64_t, std::string>> ordered;
    for (std::uint32_t node : nodes) ordered.emplace_back(uses[node], Spell(node));
    std::sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    LearnedVocab vocab;
    vocab.pieces.assign(std::begin(kSpecialTokens), std::end(kSpecialTokens));
    vocab.uses.assign(kSpecialTokenCount, 0);
    for (auto& [count, piece] : ordered) {
      vocab.pieces.push_back(std::move(piece));
      vocab.uses.push_back(count);
    }
    vocab.alphabet = alphabet_;
    vocab.threshold = threshold;
    return vocab;
  }

  const Words words_;
  const std::size_t size_;
  const int threads_;
  std::size_t alphabet_ = 0;
  std::uint64_t floor_ = 0;  // the trie holds all suffixes of this count
  Trie trie_;
  std::vector<std::uint64_t> first_;         // round 0's count of each node, 0 below floor_
  std::vector<std::uint64_t> sorted_first_;  // the same, ascending, without zeros
  std::vector<std::uint32_t> reach_;         // by position in words_.symbols
  std::unordered_set<std::string> unused_;   // pieces found never used by greedy cutting
};

}  // namespace

LearnedVocab LearnVocab(std::string_view bytes, const std::uint64_t* ends,
                        const std::uint64_t* counts, std::size_t words,
                        const LearnOptions& options) {
  if (!(options.coverage > 0 && options.coverage <= 1)) {
    throw std::invalid_argument("coverage must be in (0, 1], got " +
                                std::to_string(options.coverage));
  }
  if (options.threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " +
                                std::to_string(options.threads));
  }
  if (words >= kNone) throw std::invalid_argument("more than 2^32 - 2 words");
  Words taking_part = ReadWords(bytes, ends, counts, words, options.coverage);
  if (taking_part.size() == 0) {
    throw std::invalid_argument(
        "no word is left to learn pieces from: the lexicon is empty, or coverage too low");
  }
  return Learner(std::move(taking_part), options.size, options.threads).Run();
}

}  // namespace mvbert
