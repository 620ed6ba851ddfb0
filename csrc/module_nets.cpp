#include "module_nets.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "nets.h"

namespace nb = nanobind;

namespace moestro {
namespace {

template <int Dims, class T = float>
using Weights = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <int Dims> using Halves = Weights<Dims, uint16_t>;
using State = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Span = std::tuple<int64_t, int64_t, int64_t>;

void check(bool good, const char *what) {
  if (!good) throw std::invalid_argument(std::string("foresight nets: ") + what);
}

template <int Dims, class T = float>
void check_shape(const Weights<Dims, T> &array, const char *name, const std::vector<int64_t> &shape) {
  for (int d = 0; d < Dims; ++d) {
    check(static_cast<int64_t>(array.shape(static_cast<size_t>(d))) == shape[static_cast<size_t>(d)], name);
  }
}

// Keeps the arrays alive that its roles point into.
class ForesightNets {
public:
  ForesightNets(int64_t layers, int64_t experts, const std::vector<float> &decays, const std::vector<float> &gains,
                const std::vector<int64_t> &offsets, float fade)
      : nets_{} {
    check(layers > 0 && experts > 0 && experts % kTileExperts == 0, "experts are not filled up to whole tiles");
    check(!decays.empty() && decays.size() == gains.size() && decays.size() <= kMostParts, "too many averages");
    check(offsets.size() <= kMostParts, "too many views");
    NetShape &shape = nets_.shape;
    shape.layers = layers;
    shape.experts = experts;
    shape.averages = static_cast<int64_t>(decays.size());
    shape.views = static_cast<int64_t>(offsets.size());
    shape.fade = fade;
    std::copy(decays.begin(), decays.end(), shape.decays);
    std::copy(gains.begin(), gains.end(), shape.gains);
    std::copy(offsets.begin(), offsets.end(), shape.offsets);
    nets_.stride = shape.features() * experts;
  }

  void add_role(Halves<4> rows, Halves<3> recency, Weights<2> bias, Halves<5> outputs) {
    const NetShape &shape = nets_.shape;
    const int64_t width = static_cast<int64_t>(bias.shape(1)), horizons = static_cast<int64_t>(outputs.shape(1));
    check(width > 0 && width % 8 == 0, "the width is not a multiple of 8");
    check_shape<4>(rows, "rows", {shape.layers, shape.experts, shape.parts(), width});
    check_shape<3>(recency, "recency", {shape.layers, shape.experts, width});
    check_shape<2>(bias, "bias", {shape.layers, width});
    check_shape<5>(outputs, "outputs", {shape.layers, horizons, shape.experts / kTileExperts,
                                        1 + shape.features() + width, kTileExperts});
    roles_.push_back({rows.data(), recency.data(), outputs.data(), bias.data(), width, horizons, nets_.stride});
    nets_.stride += shape.parts() * width;
    kept_.push_back(nb::make_tuple(rows, recency, bias, outputs));
  }

  int64_t stride() const { return nets_.stride; }

  void follow(State state, int64_t kept, int64_t layer, const std::vector<Span> &spans, Ids ids, Weights<2> weights) {
    const Nets nets = with(state, layer);
    const int64_t rows = static_cast<int64_t>(ids.shape(0)), picks = static_cast<int64_t>(ids.shape(1));
    check_shape<2>(weights, "weights", {rows, picks});
    check(kept >= 0 && kept <= static_cast<int64_t>(roles_.size()), "kept");
    const int64_t *end = ids.data() + rows * picks;
    check(std::all_of(ids.data(), end, [&](int64_t id) { return id >= 0 && id < nets.shape.experts; }), "ids");
    for (const auto &[place, first, last] : spans) {
      check_place(state, place);
      check(first >= 0 && first <= last && last <= rows, "spans");
      const int64_t at = first * picks;
      kernels().nets->follow(nets, {layer, place, kept, ids.data() + at, weights.data() + at, last - first, picks});
    }
  }

  void rebuild(State state, int64_t place, int64_t role) {
    const Nets nets = with(state, 0);
    check_place(state, place);
    check_role(role);
    kernels().nets->rebuild(nets, place, role);
  }

  void answer(State state, int64_t role, int64_t layer, const std::vector<int64_t> &places, Out out) {
    const Nets nets = with(state, layer);
    check_role(role);
    for (int64_t place : places) check_place(state, place);
    const NetRole &asked = roles_[static_cast<size_t>(role)];
    check(static_cast<int64_t>(out.shape(0)) == asked.horizons &&
              static_cast<int64_t>(out.shape(1)) == nets.shape.experts,
          "out");
    const size_t count = places.size(), width = static_cast<size_t>(asked.width);
    inner_.resize(std::max(inner_.size(), count * width));
    lines_.resize(std::max(lines_.size(), count * (width + 1)));
    kernels().nets->answer(nets, {layer, role, places.data(), static_cast<int64_t>(count), inner_.data(),
                                  lines_.data(), out.data()});
  }

private:
  Nets with(const State &state, int64_t layer) const {
    check(layer >= 0 && layer < nets_.shape.layers, "layer");
    check(static_cast<int64_t>(state.shape(1)) == nets_.shape.layers &&
              static_cast<int64_t>(state.shape(2)) == nets_.stride,
          "state");
    return {nets_.shape, roles_.data(), state.data(), nets_.stride};
  }
  static void check_place(const State &state, int64_t place) {
    check(place >= 0 && place < static_cast<int64_t>(state.shape(0)), "place");
  }
  void check_role(int64_t role) const { check(role >= 0 && role < static_cast<int64_t>(roles_.size()), "role"); }

  Nets nets_;
  std::vector<NetRole> roles_;
  std::vector<nb::object> kept_;
  std::vector<float> inner_;
  std::vector<int64_t> lines_;
};

} // namespace

void add_nets(nb::module_ &m) {
  // The interpreter's lock is held: a call takes some ten microseconds, and it guards the room for inner layers.
  nb::class_<ForesightNets>(m, "ForesightNets")
      .def(nb::init<int64_t, int64_t, const std::vector<float> &, const std::vector<float> &,
                    const std::vector<int64_t> &, float>(),
           nb::arg("layers"), nb::arg("experts"), nb::arg("decays"), nb::arg("gains"), nb::arg("offsets"),
           nb::arg("fade"))
      .def("add_role", &ForesightNets::add_role, nb::arg("rows"), nb::arg("recency"), nb::arg("bias"),
           nb::arg("outputs"))
      .def_prop_ro("stride", &ForesightNets::stride)
      .def("follow", &ForesightNets::follow, nb::arg("state").noconvert(), nb::arg("kept"), nb::arg("layer"),
           nb::arg("spans"), nb::arg("ids"), nb::arg("weights"))
      .def("rebuild", &ForesightNets::rebuild, nb::arg("state").noconvert(), nb::arg("place"), nb::arg("role"))
      .def("answer", &ForesightNets::answer, nb::arg("state").noconvert(), nb::arg("role"), nb::arg("layer"),
           nb::arg("places"), nb::arg("out").noconvert());
}

} // namespace moestro
