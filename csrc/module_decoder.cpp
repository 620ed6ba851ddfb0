// The Python face of the decoder. Descriptors hold addresses; moestro.runtime.native keeps the tensors behind them.
#include "module_decoder.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "decoder.h"
#include "pointer.h"
#include "signals.h"

namespace nb = nanobind;

namespace moestro {
namespace {

using nb::arg;

Weight make_weight(int kind, uintptr_t data, int64_t outputs, int64_t inputs, int32_t group, uintptr_t bias) {
  const auto known = static_cast<Weight::Kind>(kind);
  return {known, pointer<const void>(data), outputs, inputs, group, pointer<const float>(bias)};
}

void bind_descriptors(nb::module_ &m) {
  nb::class_<Weight>(m, "Weight")
      .def(nb::init<>())
      .def("__init__",
           [](Weight *self, int kind, uintptr_t data, int64_t outputs, int64_t inputs, int32_t group, uintptr_t bias) {
             new (self) Weight(make_weight(kind, data, outputs, inputs, group, bias));
           },
           arg("kind"), arg("data"), arg("outputs"), arg("inputs"), arg("group"), arg("bias"));
  nb::class_<Norm>(m, "Norm")
      .def(nb::init<>())
      .def("__init__",
           [](Norm *self, uintptr_t weight, int64_t width, float eps) {
             new (self) Norm{pointer<const float>(weight), width, eps};
           },
           arg("weight"), arg("width"), arg("eps"));
  nb::class_<KvTarget>(m, "KvTarget")
      .def("__init__",
           [](KvTarget *self, uintptr_t data, int64_t block_stride, int64_t head_stride, int64_t position_stride) {
             new (self) KvTarget{pointer<float>(data), block_stride, head_stride, position_stride};
           },
           arg("data"), arg("block_stride"), arg("head_stride"), arg("position_stride"));
  nb::class_<Rotation>(m, "Rotation")
      .def("__init__",
           [](Rotation *self, uintptr_t cos, uintptr_t sin, int64_t positions, int64_t half) {
             new (self) Rotation{pointer<const float>(cos), pointer<const float>(sin), positions, half};
           },
           arg("cos"), arg("sin"), arg("positions"), arg("half"));
  nb::class_<Mlp>(m, "Mlp")
      .def(nb::init<>())
      .def("__init__",
           [](Mlp *self, const Weight &gate, const Weight &up, const Weight &down, const Weight &scale) {
             new (self) Mlp{gate, up, down, scale};
           },
           arg("gate"), arg("up"), arg("down"), arg("scale"));
  nb::enum_<Routing>(m, "Routing")
      .value("SOFTMAX_THEN_PICK", Routing::softmax_then_pick)
      .value("SOFTMAX_THEN_PICK_AND_SCALE", Routing::softmax_then_pick_and_scale)
      .value("PICK_THEN_SOFTMAX", Routing::pick_then_softmax);
}

void bind_layer(nb::module_ &m) {
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>())
      .def_rw("input_norm", &Layer::input_norm)
      .def_rw("post_norm", &Layer::post_norm)
      .def_rw("q", &Layer::q)
      .def_rw("k", &Layer::k)
      .def_rw("v", &Layer::v)
      .def_rw("o", &Layer::o)
      .def_rw("q_norm", &Layer::q_norm)
      .def_rw("k_norm", &Layer::k_norm)
      .def_rw("clip", &Layer::clip)
      .def_rw("heads", &Layer::heads)
      .def_rw("heads_kv", &Layer::heads_kv)
      .def_rw("head_dim", &Layer::head_dim)
      .def_rw("keys", &Layer::keys)
      .def_rw("values", &Layer::values)
      .def_prop_rw(
          "sinks", [](const Layer &layer) { return reinterpret_cast<uintptr_t>(layer.sinks); },
          [](Layer &layer, uintptr_t sinks) { layer.sinks = pointer<const float>(sinks); })
      .def_rw("scale", &Layer::scale)
      .def_rw("softcap", &Layer::softcap)
      .def_rw("window", &Layer::window)
      .def_rw("mlp", &Layer::mlp)
      .def_rw("router", &Layer::router)
      .def_rw("routing", &Layer::routing);
}

void bind_variant(nb::module_ &m) {
  const auto none_too = nb::for_setter(arg("change").none());
  nb::class_<VariantLayer>(m, "VariantLayer")
      .def(nb::init<>())
      .def_rw("input_norm", &VariantLayer::input_norm)
      .def_rw("post_norm", &VariantLayer::post_norm)
      .def_rw("q_norm", &VariantLayer::q_norm)
      .def_rw("k_norm", &VariantLayer::k_norm)
      .def_rw("q", &VariantLayer::q, none_too)
      .def_rw("k", &VariantLayer::k, none_too)
      .def_rw("v", &VariantLayer::v, none_too)
      .def_rw("o", &VariantLayer::o, none_too)
      .def_rw("gate", &VariantLayer::gate, none_too)
      .def_rw("up", &VariantLayer::up, none_too)
      .def_rw("down", &VariantLayer::down, none_too)
      .def_rw("scale", &VariantLayer::scale, none_too)
      .def_rw("router", &VariantLayer::router, none_too)
      .def_prop_rw(
          "sinks", [](const VariantLayer &layer) { return reinterpret_cast<uintptr_t>(layer.sinks); },
          [](VariantLayer &layer, uintptr_t sinks) { layer.sinks = pointer<const float>(sinks); });
  nb::class_<Variant>(m, "Variant")
      .def(nb::init<>())
      .def_rw("embedding", &Variant::embedding, none_too)
      .def_rw("head", &Variant::head, none_too)
      .def_rw("norm", &Variant::norm)
      .def("add", [](Variant &variant, const VariantLayer &layer) { variant.layers.push_back(layer); }, arg("layer"));
}

void begin(Decoder &decoder, uintptr_t token_ids, int64_t rows, uintptr_t block_table, int64_t sequences,
           int64_t max_blocks, uintptr_t row_sequence, uintptr_t row_position,
           const std::vector<std::tuple<int32_t, int64_t, int64_t>> &runs, uintptr_t variant_ids, uintptr_t given_ids,
           uintptr_t given_weights) {
  Step step{};
  step.token_ids = pointer<const int64_t>(token_ids);
  step.block_table = pointer<const int32_t>(block_table);
  step.row_sequence = pointer<const int32_t>(row_sequence);
  step.row_position = pointer<const int32_t>(row_position);
  step.variant_ids = pointer<const int64_t>(variant_ids);
  step.given_ids = pointer<const int64_t>(given_ids);
  step.given_weights = pointer<const float>(given_weights);
  for (const auto &[slot, first, end] : runs) step.runs.push_back({slot, first, end});
  step.rows = rows;
  step.sequences = sequences;
  step.max_blocks = max_blocks;
  decoder.begin(step);
}

} // namespace

void add_decoder(nb::module_ &m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  bind_descriptors(m);
  bind_layer(m);
  bind_variant(m);
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder *self, const Weight &embedding, const Norm &norm, const Weight &head, const Rotation &rotation,
              uintptr_t residual, uintptr_t hidden, uintptr_t scratch, int64_t scratch_width, uintptr_t quantised,
              size_t quantised_size, uintptr_t ids, uintptr_t weights, uintptr_t outputs, int64_t picks, int64_t rows,
              int64_t moe_layers, int64_t known_rows, int64_t blocks, int64_t block_size) {
             Workspace workspace{};
             workspace.residual = pointer<float>(residual);
             workspace.hidden = pointer<float>(hidden);
             workspace.scratch = pointer<float>(scratch);
             workspace.quantised = pointer<void>(quantised);
             workspace.ids = pointer<int64_t>(ids);
             workspace.weights = pointer<float>(weights);
             workspace.outputs = pointer<float>(outputs);
             workspace.rows = rows;
             workspace.moe_layers = moe_layers;
             workspace.known_rows = known_rows;
             workspace.scratch_width = scratch_width;
             workspace.picks = picks;
             workspace.quantised_size = quantised_size;
             new (self) Decoder(embedding, norm, head, rotation, workspace, blocks, block_size);
           },
           nb::kw_only(), arg("embedding"), arg("norm"), arg("head"), arg("rotation"), arg("residual"), arg("hidden"), arg("scratch"),
           arg("scratch_width"), arg("quantised"), arg("quantised_size"), arg("ids"), arg("weights"), arg("outputs"), arg("picks"), arg("rows"), arg("moe_layers"),
           arg("known_rows"), arg("blocks"), arg("block_size"))
      .def("add", &Decoder::add, arg("layer"))
      .def("know", &Decoder::know, arg("moe_layer"), arg("experts"), nb::keep_alive<1, 3>())
      .def(
          "fetch", [](Decoder &decoder, Fetching *fetching) { decoder.fetch(fetching, handle_signals); },
          arg("fetching").none(), nb::keep_alive<1, 2>())
      .def("spend", &Decoder::spend, arg("allowance").none(), nb::keep_alive<1, 2>())
      .def(
          "look_ahead",
          [](Decoder &decoder, uintptr_t ids, int64_t candidates, int64_t telling) {
            decoder.look_ahead(pointer<int64_t>(ids), candidates, telling);
          },
          arg("ids"), arg("candidates"), arg("telling"))
      .def_prop_ro("seen_rows", &Decoder::seen_rows)
      .def("set_variant", &Decoder::set_variant, arg("slot"), arg("variant").none())
      .def("begin", &begin, arg("token_ids"), arg("rows"), arg("block_table"), arg("sequences"), arg("max_blocks"),
           arg("row_sequence"), arg("row_position"), arg("runs") = nb::list(), arg("variant_ids") = 0,
           arg("given_ids") = 0, arg("given_weights") = 0, release())
      .def(
          "run",
          [](Decoder &decoder, uintptr_t delta, int64_t stop) { return decoder.run(pointer<const float>(delta), stop); },
          arg("delta"), arg("stop") = -1, release())
      .def(
          "logits",
          [](Decoder &decoder, uintptr_t rows, int64_t count, uintptr_t out) {
            decoder.logits(pointer<const int64_t>(rows), count, pointer<float>(out));
          },
          release())
      .def_prop_ro("kernel_seconds", &Decoder::kernel_seconds)
      .def_prop_ro("experts_seconds", &Decoder::experts_seconds);
}

} // namespace moestro
