#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "nets.h"
#include "rows.h"

#ifdef MOESTRO_ARM64
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moestro {
namespace {

#define MOESTRO_PACKED(isa) constexpr PackedTable isa##_packed = {isa::packed_tiles, isa::quantise_row, isa::activate};
// `floats` and `packed` name the builds that a table's kernels come from.
#define MOESTRO_TABLE(name, floats, packed)                                                                            \
  constexpr KernelTable name##_table = {#name,                                                                         \
                                        &packed##_packed,                                                              \
                                        floats::linear,                                                                \
                                        floats::attention,                                                             \
                                        floats::linear_scratch,                                                        \
                                        floats::attention_scratch,                                                     \
                                        floats::round_columns,                                                         \
                                        floats::descend,                                                               \
                                        floats::scale_costs,                                                           \
                                        &floats::row_table,                                                            \
                                        &floats::net_table};
MOESTRO_PACKED(scalar)
MOESTRO_TABLE(scalar, scalar, scalar)
#ifdef MOESTRO_X86
MOESTRO_PACKED(avx2)
MOESTRO_PACKED(avx512vnni)
MOESTRO_TABLE(avx2, avx2, avx2)
MOESTRO_TABLE(avx512, avx512, avx2)
MOESTRO_TABLE(avx512vnni, avx512, avx512vnni)
#endif
#ifdef MOESTRO_ARM64
MOESTRO_PACKED(neon)
MOESTRO_TABLE(neon, scalar, neon)
#endif
#undef MOESTRO_TABLE
#undef MOESTRO_PACKED

std::atomic<const KernelTable *> &current() {
  static std::atomic<const KernelTable *> table{available_kernels().front()};
  return table;
}

void check(bool good, const char *what, int64_t row, int64_t value, int64_t limit) {
  if (good) return;
  throw std::invalid_argument(std::string("attention row ") + std::to_string(row) + ": " + what + " " +
                              std::to_string(value) + " is not in [0, " + std::to_string(limit) + ")");
}

// The positions of one sequence whose blocks are known to be good.
struct Checked {
  int64_t sequence = -1, low = 0, high = -1;
};

void check_blocks(const AttentionArgs &args, int64_t row, int64_t sequence, int64_t low, int64_t high) {
  const int32_t *table = args.block_table + sequence * args.max_blocks;
  for (int64_t b = low / args.block_size; b <= high / args.block_size; ++b) {
    check(table[b] >= 0 && table[b] < args.blocks, "block", row, table[b], args.blocks);
  }
}

void check_positions(const AttentionArgs &args, int64_t row, int64_t low, int64_t high, Checked &checked) {
  const int64_t sequence = args.row_sequence[row];
  if (sequence != checked.sequence || high < checked.low || low > checked.high) {
    check_blocks(args, row, sequence, low, high);
    checked = {sequence, low, high};
    return;
  }
  if (low < checked.low) check_blocks(args, row, sequence, low, checked.low);
  if (high > checked.high) check_blocks(args, row, sequence, checked.high, high);
  checked.low = std::min(checked.low, low);
  checked.high = std::max(checked.high, high);
}

} // namespace

std::vector<RowGroup> group_rows(const AttentionArgs &args) {
  const int64_t most = std::max<int64_t>(1, kQueriesPerTask / (args.heads / args.heads_kv));
  std::vector<RowGroup> groups;
  groups.reserve(static_cast<size_t>(args.rows / most + args.sequences + 1));
  Checked checked;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t sequence = args.row_sequence[row], position = args.row_position[row];
    check(sequence >= 0 && sequence < args.sequences, "sequence", row, sequence, args.sequences);
    const int64_t limit = args.max_blocks * args.block_size;
    check(position >= 0 && position < limit, "position", row, position, limit);
    const int64_t low = first_position(position, args.window);
    check_positions(args, row, low, position, checked);
    const bool joins = !groups.empty() && groups.back().count < most && args.row_sequence[row - 1] == sequence;
    if (!joins) groups.push_back({row, 0, low, position});
    RowGroup &group = groups.back();
    group.count += 1;
    group.low = std::min(group.low, low);
    group.high = std::max(group.high, position);
  }
  return groups;
}

std::vector<const KernelTable *> available_kernels() {
  std::vector<const KernelTable *> tables;
#ifdef MOESTRO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512vnni_table);
  if (avx512) tables.push_back(&avx512_table);
  if (avx2) tables.push_back(&avx2_table);
#endif
#ifdef MOESTRO_ARM64
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) tables.push_back(&neon_table);
#endif
  tables.push_back(&scalar_table);
  return tables;
}

const KernelTable &kernels() { return *current().load(); }

bool use_kernels(const char *name) {
  for (const KernelTable *table : available_kernels()) {
    if (std::strcmp(table->name, name) != 0) continue;
    current().store(table);
    return true;
  }
  return false;
}

void run_attention(const AttentionArgs &args) {
  const std::vector<RowGroup> groups = group_rows(args);
  kernels().attention(args, groups.data(), static_cast<int64_t>(groups.size()));
}

} // namespace moestro
