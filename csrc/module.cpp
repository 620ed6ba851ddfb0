// The Python face of the kernels. Tensors come as addresses and sizes, already checked by moestro.kernels.cpu: a call
// takes well under a microsecond, which tensor objects would not.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "combine.h"
#include "dispatch.h"
#include "module_decoder.h"
#include "module_lowest.h"
#include "module_nets.h"
#include "module_packed.h"
#include "module_reads.h"
#include "module_rounding.h"
#include "pointer.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace moestro {
namespace {

void linear(uintptr_t x, int64_t x_stride, uintptr_t weight, int weight_type, uintptr_t bias, int bias_type,
            uintptr_t out, int64_t tokens, int64_t outputs, int64_t inputs) {
  LinearArgs args{};
  args.x = pointer<const float>(x);
  args.x_stride = x_stride;
  args.w = pointer<const void>(weight);
  args.w_type = static_cast<DType>(weight_type);
  args.bias = pointer<const void>(bias);
  args.bias_type = static_cast<DType>(bias_type);
  args.y = pointer<float>(out);
  args.tokens = tokens;
  args.outputs = outputs;
  args.inputs = inputs;
  kernels().linear(args);
}

void attention(uintptr_t query, int64_t query_row_stride, int64_t query_head_stride, uintptr_t keys,
               int64_t key_block_stride, int64_t key_head_stride, int64_t key_position_stride, uintptr_t values,
               int64_t value_block_stride, int64_t value_head_stride, int64_t value_position_stride,
               uintptr_t block_table, uintptr_t row_sequence, uintptr_t row_position, uintptr_t sinks, uintptr_t out,
               int64_t rows, int64_t heads, int64_t heads_kv, int64_t key_dim, int64_t value_dim, int64_t blocks,
               int64_t block_size, int64_t sequences, int64_t max_blocks, float scale, int64_t window, float softcap) {
  AttentionArgs args{};
  args.query = pointer<const float>(query);
  args.query_row_stride = query_row_stride;
  args.query_head_stride = query_head_stride;
  args.keys = {pointer<const float>(keys), key_block_stride, key_head_stride, key_position_stride, key_dim};
  args.values = {pointer<const float>(values), value_block_stride, value_head_stride, value_position_stride, value_dim};
  args.block_table = pointer<const int32_t>(block_table);
  args.row_sequence = pointer<const int32_t>(row_sequence);
  args.row_position = pointer<const int32_t>(row_position);
  args.sinks = pointer<const float>(sinks);
  args.out = pointer<float>(out);
  args.rows = rows;
  args.heads = heads;
  args.heads_kv = heads_kv;
  args.blocks = blocks;
  args.block_size = block_size;
  args.sequences = sequences;
  args.max_blocks = max_blocks;
  args.scale = scale;
  args.window = window;
  args.softcap = softcap;
  run_attention(args);
}

void combine_outputs(uintptr_t outputs, uintptr_t weights, uintptr_t out, int64_t tokens, int64_t picks,
                     int64_t width) {
  combine(pointer<const float>(outputs), pointer<const float>(weights), pointer<float>(out), tokens, picks, width);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable *table : available_kernels()) names.emplace_back(table->name);
  return names;
}

void set_isa(const std::string &name) {
  if (use_kernels(name.c_str())) return;
  std::string names;
  for (const std::string &known : available_isas()) names += (names.empty() ? "" : ", ") + known;
  throw std::invalid_argument("no kernels named '" + name + "' on this machine; there are: " + names);
}

void set_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to 1024");
  }
  pool().set_threads(threads);
}

struct Reading {
  const uint64_t *words;
  int64_t count, per_task;
  std::atomic<uint64_t> sum{0};
};

void read_task(void *context, int64_t task, char *) {
  Reading &reading = *static_cast<Reading *>(context);
  const int64_t first = task * reading.per_task;
  const int64_t end = first + reading.per_task < reading.count ? first + reading.per_task : reading.count;
  uint64_t sums[4] = {};
  int64_t i = first;
  for (; i + 4 <= end; i += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += reading.words[i + lane];
  }
  for (; i < end; ++i) sums[0] += reading.words[i];
  reading.sum += sums[0] + sums[1] + sums[2] + sums[3];
}

uint64_t sum_words(uintptr_t address, int64_t nbytes) {
  Reading reading{pointer<const uint64_t>(address), nbytes / 8, 1 << 15};
  pool().run((reading.count + reading.per_task - 1) / reading.per_task, 0, true, read_task, &reading);
  return reading.sum;
}

} // namespace
} // namespace moestro

NB_MODULE(_native, m) {
  // A script that ends with a model open is no fault of whoever reads its last lines.
  nb::set_leak_warnings(false);
  using namespace moestro;
  using nb::gil_scoped_release;
  using release = nb::call_guard<gil_scoped_release>;
  m.doc() = "Compiled CPU kernels; call them through moestro.kernels.";
  m.def("linear", &linear, release());
  m.def("attention", &attention, release());
  m.def("combine", &combine_outputs, release());
  m.def("set_threads", &set_threads, release(), nb::arg("threads"));
  m.def("get_threads", [] { return pool().threads(); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa, nb::arg("name"));
  m.def("get_isa", [] { return std::string(kernels().name); });
  m.def("linear_scratch_bytes", [] { return kernels().linear_scratch(); });
  m.def(
      "attention_scratch_bytes",
      [](int64_t positions, int64_t dim) { return kernels().attention_scratch(positions, dim); }, nb::arg("positions"),
      nb::arg("value_dim"));
  m.def("scratch_bytes", [] { return pool().scratch_bytes(); }, release());
  m.def("sum_words", &sum_words, release(), nb::arg("address"), nb::arg("nbytes"));
  add_reads(m);
  add_packed(m);
  add_decoder(m);
  add_lowest(m);
  add_nets(m);
  add_rounding(m);
}
