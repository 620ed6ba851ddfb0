#include "module_packed.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "allowance.h"
#include "dispatch.h"
#include "known_experts.h"
#include "pointer.h"
#include "signals.h"
#include "thread_pool.h"
#include "unpack.h"

namespace nb = nanobind;

namespace moestro {
namespace {

template <class T> using List = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<const int64_t, nb::shape<-1, kPlanes>, nb::c_contig, nb::device::cpu>;
using Addresses = std::vector<int64_t>;

MatrixShape make_matrix(int encoding, int64_t rows, int64_t columns, int32_t group, const Addresses &offsets) {
  if (offsets.empty() || offsets.size() > kPlanes) throw std::invalid_argument("a chain has one to four planes");
  MatrixShape shape{static_cast<Encoding>(encoding), rows, columns, group, static_cast<int32_t>(offsets.size()), {}};
  for (size_t p = 0; p < offsets.size(); ++p) shape.offsets[p] = offsets[p];
  return shape;
}

ExpertShape make_expert(const MatrixShape &up, const MatrixShape &down, int64_t up_bias, int64_t down_bias, int gate,
                        int activation, float alpha, float limit) {
  return {
      up, down, up_bias, down_bias, {static_cast<ActivationName>(activation), static_cast<Gate>(gate), alpha, limit}};
}

DeltaShape make_delta(int encoding, int64_t rows, int64_t columns, int32_t group, int64_t salient, int64_t ids,
                      int64_t values, int64_t bias) {
  return checked({static_cast<Encoding>(encoding), rows, columns, group, salient, ids, values, bias});
}

ExpertDeltaShape make_expert_delta(const DeltaShape *up, const DeltaShape *down, int64_t up_at, int64_t down_at) {
  ExpertDeltaShape shape{up != nullptr, down != nullptr, {}, {}, up_at, down_at};
  if (up != nullptr) shape.up = *up;
  if (down != nullptr) shape.down = *down;
  return shape;
}

// Deltas as they come from Python. The lists are the caller's.
struct DeltaLists {
  std::vector<const ExpertDeltaShape *> shapes;
  List<int32_t> jobs, firsts, ends, shape;
  List<int64_t> planes;

  ExpertDeltas view() const {
    const size_t count = jobs.size();
    if (firsts.size() != count || ends.size() != count || shape.size() != count || planes.size() != count) {
      throw std::invalid_argument("experts: the lists of deltas have different lengths");
    }
    return {static_cast<int64_t>(count), shapes.data(), static_cast<int64_t>(shapes.size()),
            jobs.data(), firsts.data(), ends.data(), shape.data(), planes.data()};
  }
};

void experts(const ExpertShape &shape, const Planes &planes, const List<int32_t> &levels, const List<int32_t> &starts,
             const List<int32_t> &rows, const List<int32_t> &places, uintptr_t hidden, int64_t hidden_stride,
             int64_t hidden_rows, uintptr_t out, int64_t out_stride, int64_t out_rows, const DeltaLists &lists) {
  const auto count = static_cast<int64_t>(levels.size()), listed = static_cast<int64_t>(rows.size());
  if (static_cast<int64_t>(planes.shape(0)) != count || static_cast<int64_t>(starts.size()) != count + 1 ||
      places.size() != rows.size()) {
    throw std::invalid_argument("experts: the lists of jobs have different lengths");
  }
  const ExpertJobs jobs{count, planes.data(), levels.data(), starts.data(), rows.data(), places.data(), listed};
  const ExpertDeltas deltas = lists.view();
  nb::gil_scoped_release release;
  run_experts(shape, jobs, {pointer<const float>(hidden), hidden_stride, hidden_rows},
              {pointer<float>(out), out_stride, out_rows}, deltas);
}

void set_deltas(KnownExperts &known, int32_t slot, const ExpertDeltaShape *shape, uintptr_t planes) {
  if (shape == nullptr) {
    known.deltas.erase(slot);
  } else {
    known.deltas[slot] = {*shape, pointer<const int64_t>(planes)};
  }
}

using Runs = std::vector<std::tuple<int32_t, int64_t, int64_t>>;

std::vector<RowRun> row_runs(const Runs &of_rows) {
  std::vector<RowRun> runs;
  for (const auto &[slot, first, end] : of_rows) runs.push_back({slot, first, end});
  return runs;
}

bool covers(const KnownExperts &known, uintptr_t ids, int64_t rows, int64_t picks, const Runs &of_rows) {
  const std::vector<RowRun> runs = row_runs(of_rows);
  return all_known(known, {nullptr, pointer<const int64_t>(ids), nullptr, rows, picks, runs.data(),
                           static_cast<int64_t>(runs.size())});
}

bool known_experts(const KnownExperts &known, uintptr_t hidden, uintptr_t ids, uintptr_t weights, int64_t rows,
                   int64_t picks, uintptr_t outputs, uintptr_t sums, const Runs &of_rows) {
  const std::vector<RowRun> runs = row_runs(of_rows);
  const RoutedRows routed{pointer<const float>(hidden), pointer<const int64_t>(ids), pointer<const float>(weights),
                          rows, picks, runs.data(), static_cast<int64_t>(runs.size())};
  return run_known(known, routed, pointer<float>(outputs), pointer<float>(sums));
}

using Computed = std::vector<std::tuple<double, double, int64_t>>;
using Waited = std::vector<std::tuple<double, double, int64_t, double>>;

std::optional<std::pair<Computed, Waited>> arriving_experts(KnownExperts &known, uintptr_t hidden, uintptr_t ids,
                                                            uintptr_t weights, int64_t rows, int64_t picks,
                                                            uintptr_t outputs, uintptr_t sums, Arrivals &arrivals) {
  const RoutedRows routed{pointer<const float>(hidden), pointer<const int64_t>(ids), pointer<const float>(weights),
                          rows, picks};
  Course course;
  {
    const nb::gil_scoped_release release;
    const bool all =
        run_arriving(known, routed, arrivals, pointer<float>(outputs), pointer<float>(sums), course, handle_signals);
    if (!all) return {};
  }
  std::pair<Computed, Waited> moments;
  for (const auto &one : course.computed) moments.first.emplace_back(one.begun, one.ended, one.experts);
  for (const auto &one : course.waited) moments.second.emplace_back(one.begun, one.ended, one.expert, one.read);
  return moments;
}

PackedMatrix at(const MatrixShape &shape, Addresses planes, int32_t level) {
  planes.resize(kPlanes);
  return packed_matrix(shape, planes.data(), level);
}

void linear(const MatrixShape &shape, const Addresses &planes, int32_t level, uintptr_t x, int64_t x_stride,
            int64_t rows, uintptr_t bias, uintptr_t y) {
  const PackedMatrix matrix = at(shape, planes, level);
  nb::gil_scoped_release release;
  const auto turn = pool().turn();
  char *memory = pool().shared(quantised_bytes(rows, shape.columns, shape.group));
  const QuantisedRows quantised = quantised_view(memory, rows, shape.columns, shape.group);
  quantise(pointer<const float>(x), x_stride, shape.columns, quantised);
  const PackedLinear call{matrix, quantised, pointer<const float>(bias), pointer<float>(y), shape.rows};
  packed_linear(&call, 1);
}

void unpack_matrix(const MatrixShape &shape, const Addresses &planes, int32_t level, uintptr_t out) {
  const PackedMatrix matrix = at(shape, planes, level);
  nb::gil_scoped_release release;
  unpack(matrix, pointer<float>(out));
}

void matrix_rows(const MatrixShape &shape, const Addresses &planes, uintptr_t ids, int64_t count, uintptr_t out) {
  const PackedMatrix matrix = at(shape, planes, flat_bits(shape.encoding));
  nb::gil_scoped_release release;
  unpack_rows(matrix, pointer<const int64_t>(ids), count, pointer<float>(out));
}

void add_delta(const Delta &delta, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y, int64_t y_stride) {
  const PackedMatrix &matrix = delta.matrix;
  const auto turn = pool().turn();
  char *memory = pool().shared(quantised_bytes(rows, matrix.columns, matrix.group));
  const QuantisedRows quantised = quantised_view(memory, rows, matrix.columns, matrix.group);
  quantise(pointer<const float>(x), x_stride, matrix.columns, quantised);
  const PackedLinear call = linear_of(delta, quantised, pointer<float>(y), y_stride);
  packed_linear(&call, 1);
}

void activate_row(const ExpertShape &shape, uintptr_t gate, uintptr_t up, int64_t count, uintptr_t out) {
  packed_kernels().activate(shape.activation, pointer<const float>(gate), pointer<const float>(up), count,
                            pointer<float>(out));
}

void add_allowance(nb::module_ &m) {
  nb::class_<Allowance>(m, "Allowance")
      .def("__init__",
           [](Allowance *self, uintptr_t costs, uintptr_t per_byte, int64_t layers, int64_t experts, int64_t levels) {
             new (self) Allowance(pointer<const double>(costs), pointer<const double>(per_byte), layers, experts, levels);
           },
           nb::arg("costs"), nb::arg("per_byte"), nb::arg("layers"), nb::arg("experts"), nb::arg("levels"))
      .def(
          "hold",
          [](Allowance &allowance, int64_t moe, KnownExperts &levelled, uintptr_t planes, int64_t experts,
             const std::vector<int64_t> &depths) {
            allowance.hold(moe, {&levelled, pointer<const int64_t>(planes), experts, depths});
          },
          nb::arg("moe_layer"), nb::arg("levelled"), nb::arg("planes"), nb::arg("experts"), nb::arg("depths"),
          nb::keep_alive<1, 3>())
      .def(
          "begin",
          [](Allowance &allowance, double price, double left, uintptr_t levels) {
            allowance.begin(price, left, pointer<int64_t>(levels));
          },
          nb::arg("price"), nb::arg("left"), nb::arg("levels"))
      .def(
          "compute",
          [](Allowance &allowance, int64_t moe, uintptr_t hidden, uintptr_t ids, uintptr_t weights, int64_t picks,
             uintptr_t outputs, uintptr_t sum) {
            const RoutedRows routed{pointer<const float>(hidden), pointer<const int64_t>(ids),
                                    pointer<const float>(weights), 1, picks};
            return allowance.compute(moe, routed, pointer<float>(outputs), pointer<float>(sum));
          },
          nb::arg("moe_layer"), nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("picks"),
          nb::arg("outputs"), nb::arg("sum"), nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("left", &Allowance::left);
}

} // namespace

void add_packed(nb::module_ &m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<MatrixShape>(m, "Matrix");
  nb::class_<ExpertShape>(m, "Experts");
  add_allowance(m);
  nb::class_<KnownExperts>(m, "KnownExperts")
      .def("__init__",
           [](KnownExperts *self, const ExpertShape &shape, uintptr_t planes, int64_t count,
              const std::vector<int32_t> &levels) {
             if (levels.empty()) throw std::invalid_argument("known experts: there are no levels");
             new (self) KnownExperts{shape, pointer<int64_t>(planes), count, levels, {}};
           },
           nb::arg("experts"), nb::arg("planes"), nb::arg("count"), nb::arg("levels"))
      .def("set_deltas", &set_deltas, nb::arg("slot"), nb::arg("shape").none(), nb::arg("planes"))
      .def("covers", &covers, nb::arg("ids"), nb::arg("rows"), nb::arg("picks"), nb::arg("runs") = nb::list())
      .def("run", &known_experts, nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("rows"),
           nb::arg("picks"), nb::arg("outputs"), nb::arg("sums"), nb::arg("runs") = nb::list(), release())
      .def("run_arriving", &arriving_experts, nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("rows"),
           nb::arg("picks"), nb::arg("outputs"), nb::arg("sums"), nb::arg("arrivals"));
  m.def("make_matrix", &make_matrix);
  m.def("make_experts", &make_expert);
  nb::class_<DeltaShape>(m, "DeltaShape");
  nb::class_<ExpertDeltaShape>(m, "ExpertDelta");
  nb::class_<Delta>(m, "Delta")
      .def("__init__",
           [](Delta *self, const DeltaShape &shape, uintptr_t address) {
             new (self) Delta(delta_at(shape, pointer<const uint8_t>(address)));
           },
           nb::arg("shape"), nb::arg("address"));
  nb::class_<DeltaLists>(m, "ExpertDeltas")
      .def("__init__",
           [](DeltaLists *self, std::vector<const ExpertDeltaShape *> shapes, List<int32_t> jobs, List<int32_t> firsts,
              List<int32_t> ends, List<int32_t> shape, List<int64_t> planes) {
             new (self) DeltaLists{std::move(shapes), std::move(jobs), std::move(firsts), std::move(ends),
                                   std::move(shape), std::move(planes)};
           });
  m.def("make_delta", &make_delta);
  m.def("make_expert_delta", &make_expert_delta, nb::arg("up").none(), nb::arg("down").none(), nb::arg("up_at"),
        nb::arg("down_at"));
  m.def("add_delta", &add_delta, release());
  m.def("unpack_delta", [](const Delta &delta, uintptr_t out) { unpack_delta(delta, pointer<float>(out)); }, release());
  m.def(
      "add_delta_rows",
      [](const Delta &delta, uintptr_t ids, int64_t count, uintptr_t out) {
        add_delta_rows(delta, pointer<const int64_t>(ids), count, pointer<float>(out));
      },
      release());
  m.def("experts", &experts);
  m.def("packed_linear", &linear);
  m.def("unpack", &unpack_matrix);
  m.def("packed_rows", &matrix_rows);
  m.def("activate", &activate_row, release());
  m.def("experts_shared_bytes", &experts_shared_bytes, nb::arg("rows"), nb::arg("hidden"), nb::arg("hidden_group"),
        nb::arg("listed"), nb::arg("width"), nb::arg("width_group"), nb::arg("threads"));
  m.def("experts_scratch_bytes", &experts_scratch_bytes);
  m.def("quantised_bytes", &quantised_bytes, nb::arg("rows"), nb::arg("columns"), nb::arg("group"));
}

} // namespace moestro
