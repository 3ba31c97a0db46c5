// Python: word ids to training rows.

#include <array>
#include <tuple>

#include "bindings.h"
#include "masking.h"
#include "mixer.h"
#include "philox.h"
#include "philox_blocks.h"

namespace mvbert::python {
namespace {

Segments SegmentsShim(const Flat<std::uint32_t>& ends, const Flat<std::int32_t>& ids,
                      std::int32_t size, std::int32_t cls, std::int32_t sep, std::int32_t mask,
                      std::vector<std::int32_t> special) {
  Segments segments;
  segments.ends = ends.data();
  segments.ids = ids.data();
  segments.words = static_cast<std::size_t>(ends.size());
  segments.pieces = static_cast<std::size_t>(ids.size());
  segments.size = size;
  segments.cls = cls;
  segments.sep = sep;
  segments.mask = mask;
  segments.special = std::move(special);
  return segments;
}

// (ends u32 [W], ids i32, size, cls, sep, mask, special ids)
using SegmentsArguments =
    std::tuple<Flat<std::uint32_t>, Flat<std::int32_t>, std::int32_t, std::int32_t, std::int32_t,
               std::int32_t, std::vector<std::int32_t>>;

std::shared_ptr<PieceTable> PieceTableShim(const std::optional<SegmentsArguments>& teacher,
                                           const std::optional<SegmentsArguments>& student) {
  std::optional<Segments> parts[2];
  if (teacher) parts[0] = std::apply(SegmentsShim, *teacher);
  if (student) parts[1] = std::apply(SegmentsShim, *student);
  // The argument tuples hold the arrays until the table is made.
  py::gil_scoped_release release;
  return std::make_shared<PieceTable>(parts[0] ? &*parts[0] : nullptr,
                                      parts[1] ? &*parts[1] : nullptr);
}

// (document marks, pieces under the first vocabulary, pieces under the second)
std::tuple<std::uint64_t, std::uint64_t, std::uint64_t> MeasureShim(
    const PieceTable& table, const Flat<std::uint32_t>& stream, int threads) {
  py::gil_scoped_release release;
  const auto totals =
      StreamTotals::Of(table, stream.data(), static_cast<std::size_t>(stream.size()), threads);
  return {totals.marks, totals.pieces[0], totals.pieces[1]};
}

// A Mixer and what it points to.
struct MixerShim {
  std::shared_ptr<PieceTable> table;
  Flat<std::uint32_t> stream;
  Mixer mixer;

  MixerShim(std::shared_ptr<PieceTable> table_in, Flat<std::uint32_t> stream_in, std::uint64_t seed,
            std::uint32_t T, std::uint32_t stride, std::uint64_t pair_threshold,
            std::uint32_t capacity, std::vector<std::uint32_t> budgets)
      : table(std::move(table_in)),
        stream(std::move(stream_in)),
        mixer(*table, stream.data(), static_cast<std::size_t>(stream.size()),
              {seed, T, stride, pair_threshold, capacity, std::move(budgets)}) {}

  void Read(std::uint64_t start, std::uint64_t count, std::uint64_t student_threshold, int threads,
            Flat<std::int32_t> input_ids, Flat<std::uint8_t> token_type_ids,
            Flat<std::int32_t> masked_positions, Flat<std::int32_t> labels) const {
    const std::uint64_t T = mixer.options().T, M = mixer.options().capacity;
    const auto check = [&](const py::array& array, std::uint64_t width, const char* name) {
      if (static_cast<std::uint64_t>(array.size()) != count * width) {
        throw std::invalid_argument(std::string(name) + " must have " +
                                    std::to_string(count * width) + " elements, got " +
                                    std::to_string(array.size()));
      }
    };
    check(input_ids, T, "input_ids");
    check(token_type_ids, T, "token_type_ids");
    check(masked_positions, M, "masked_positions");
    check(labels, M, "labels");
    const Mixer::Rows out = {input_ids.mutable_data(), token_type_ids.mutable_data(),
                             masked_positions.mutable_data(), labels.mutable_data()};
    py::gil_scoped_release release;
    mixer.Read(start, count, student_threshold, threads, out);
  }

  std::vector<std::uint64_t> Starts(std::uint64_t start, std::size_t count) const {
    py::gil_scoped_release release;
    std::vector<std::uint64_t> first(count);
    mixer.Starts(start, count, first.data());
    return first;
  }
};

// {name: 64 numbers} for every implementation that this machine can run.
std::vector<std::pair<std::string, std::vector<std::uint32_t>>> PhiloxBlocksShim(
    std::array<std::uint32_t, 16> first, std::array<std::uint32_t, 3> rest,
    std::array<std::uint32_t, 2> key) {
  std::vector<std::pair<std::string, std::vector<std::uint32_t>>> results;
  for (const PhiloxBlocksChoice& choice : PhiloxBlocksChoices()) {
    results.emplace_back(choice.name, std::vector<std::uint32_t>(64));
    choice.function(first.data(), rest, key, results.back().second.data());
  }
  return results;
}

// Masks rows in place; their labels.
py::array_t<std::int64_t> MaskRowsShim(Flat<std::int64_t> ids, const Flat<std::int64_t>& lengths,
                                       const Flat<std::uint8_t>& kinds, std::int64_t mask,
                                       bool by_word, const Flat<std::uint32_t>& budgets,
                                       std::uint64_t piece_threshold, std::uint64_t mask_threshold,
                                       std::uint64_t other_threshold, std::uint64_t seed,
                                       std::uint64_t epoch, int threads) {
  if (ids.ndim() != 2 || lengths.size() != ids.shape(0)) {
    throw std::invalid_argument("expected ids [B, T] and lengths [B]");
  }
  const MaskingOptions options = {kinds.data(),
                                  static_cast<std::size_t>(kinds.size()),
                                  mask,
                                  by_word,
                                  budgets.data(),
                                  static_cast<std::size_t>(budgets.size()),
                                  piece_threshold,
                                  mask_threshold,
                                  other_threshold,
                                  seed,
                                  epoch};
  py::array_t<std::int64_t> labels({ids.shape(0), ids.shape(1)});
  std::int64_t* const ids_data = ids.mutable_data();
  std::int64_t* const labels_data = labels.mutable_data();
  const auto rows = static_cast<std::size_t>(ids.shape(0));
  const auto width = static_cast<std::size_t>(ids.shape(1));
  {
    py::gil_scoped_release release;
    MaskRows(options, rows, width, lengths.data(), threads, ids_data, labels_data);
  }
  return labels;
}

// The lengths of rows by their attention mask; None where a row is not ones and then zeros, for the
// caller to say which.
py::object LengthsOfMaskShim(const Flat<std::int64_t>& mask) {
  if (mask.ndim() != 2) throw std::invalid_argument("expected an attention mask [B, T]");
  py::array_t<std::int64_t> lengths(mask.shape(0));
  std::int64_t* const lengths_data = lengths.mutable_data();
  bool regular = false;
  {
    py::gil_scoped_release release;
    regular = LengthsOfMask(mask.data(), static_cast<std::size_t>(mask.shape(0)),
                            static_cast<std::size_t>(mask.shape(1)), lengths_data);
  }
  return regular ? py::object(lengths) : py::none();
}

}  // namespace

void BindRows(py::module_& m) {
  m.def("mask_rows", &MaskRowsShim, py::arg("ids").noconvert(), py::arg("lengths"), py::kw_only(),
        py::arg("kinds"), py::arg("mask"), py::arg("by_word"), py::arg("budgets"),
        py::arg("piece_threshold"), py::arg("mask_threshold"), py::arg("other_threshold"),
        py::arg("seed"), py::arg("epoch"), py::arg("threads"));
  m.def("lengths_of_mask", &LengthsOfMaskShim, py::arg("mask").noconvert());
  m.def("philox4x32", &Philox4x32, py::arg("counter"), py::arg("key"));
  m.def("philox_blocks", &PhiloxBlocksShim, py::arg("first"), py::arg("rest"), py::arg("key"));
  py::class_<PieceTable, std::shared_ptr<PieceTable>>(m, "PieceTable")
      .def(py::init(&PieceTableShim), py::arg("teacher"), py::arg("student"))
      .def("measure", &MeasureShim, py::arg("stream").noconvert(), py::arg("threads"));
  py::class_<MixerShim>(m, "Mixer")
      .def(py::init<std::shared_ptr<PieceTable>, Flat<std::uint32_t>, std::uint64_t, std::uint32_t,
                    std::uint32_t, std::uint64_t, std::uint32_t, std::vector<std::uint32_t>>(),
           py::arg("table"), py::arg("stream").noconvert(), py::arg("seed"), py::arg("T"),
           py::arg("stride"), py::arg("pair_threshold"), py::arg("capacity"), py::arg("budgets"))
      .def("read", &MixerShim::Read, py::arg("start"), py::arg("count"),
           py::arg("student_threshold"), py::arg("threads"), py::arg("input_ids").noconvert(),
           py::arg("token_type_ids").noconvert(), py::arg("masked_positions").noconvert(),
           py::arg("labels").noconvert())
      .def("starts", &MixerShim::Starts, py::arg("start"), py::arg("count"));
}

}  // namespace mvbert::python
