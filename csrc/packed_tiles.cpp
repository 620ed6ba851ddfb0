// Tiles of a quantised matrix times rows of quantised activations.
//
// Codes go from the planes into registers and are used there for a few rows at once; for more rows the same tile, by
// then in cache, is unpacked again. Keeping unpacked codes in cache instead was measured to be slower (AVX-512) or no
// faster (AVX2): a row's dot products cost more than its share of the unpacking.
#include "packed_layout.h"
#include "packed_salient.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

// How far ahead of use planes are asked for.
constexpr int64_t kAhead = 1024;

MOESTRO_INLINE void write(const TileTask &task, int64_t row, int part, int64_t t, Reals result) {
  const int64_t n = row + part * kPartRows;
  float *out = task.out[t] + (n - task.first_row);
  const int64_t left = task.matrix->rows - n;
  if (left >= kPartRows) {
    if (task.delta != nullptr) result = add_reals(load_reals(out), result);
    store_reals(out, task.bias == nullptr ? result : add_reals(result, load_reals(task.bias + n)));
    return;
  }
  float all[kPartRows];
  store_reals(all, result);
  for (int64_t i = 0; i < left; ++i) {
    const float value = task.delta == nullptr ? all[i] : out[i] + all[i];
    out[i] = task.bias == nullptr ? value : value + task.bias[n + i];
  }
}

template <Form F> MOESTRO_INLINE void ask_for(const GroupCodes &at, int64_t block) {
  const auto ask = [&](int plane, int lines) {
    const uint8_t *p = at.plane[plane] + block * lines * kChunk + kAhead;
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + i * kChunk);
  };
  ask(0, F == Form::flat8 ? 8 : (F == Form::flat4 ? 4 : (F == Form::flat1 ? 1 : 2)));
  if constexpr (planes_of(F) > 1) ask(1, 1);
  if constexpr (planes_of(F) > 2) ask(2, 1);
  if constexpr (planes_of(F) > 3) ask(3, 4);
}

template <int Tokens> constexpr int chains_of = (kChains + Tokens - 1) / Tokens;

// Sums of N parts of one group's codes with `Tokens` rows: dots[t][dot][chain].
template <Form F, int Tokens, int N>
MOESTRO_INLINE void dot_group(const GroupCodes &codes, bool ahead, const int8_t *const *x, int64_t blocks,
                              TileDot<N> (&dots)[Tokens][dots_of(F)][chains_of<Tokens>]) {
  for (auto &row : dots) {
    for (auto &dot : row) {
      for (TileDot<N> &chain : dot) chain.clear();
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    if (ahead) ask_for<F>(codes, block);
    const auto use = [&](auto dot, int quad, const Codes<N> &unpacked) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const auto a = load_quad(x[t] + block * kBlockColumns + 4 * quad);
        dots[t][decltype(dot)::value][quad % chains_of<Tokens>].template add<is_wide(F)>(unpacked, a);
      }
    };
    unpack_block<F, N>(codes, block, use);
    for (auto &row : dots) {
      for (auto &dot : row) {
        for (TileDot<N> &chain : dot) chain.flush();
      }
    }
  }
}

// Multiplies results by the unit and, of a delta, adds its salient channels.
template <int Tokens>
MOESTRO_INLINE void write_tile(const TileTask &task, float unit, const SalientInputs &inputs, int64_t tile,
                               int64_t first, const Reals (&acc)[Tokens][kParts]) {
  Reals results[Tokens][kParts];
  for (int t = 0; t < Tokens; ++t) {
    for (int part = 0; part < kParts; ++part) results[t][part] = mul_reals(acc[t][part], all_reals(unit));
  }
  if (task.delta != nullptr) add_salient<Tokens>(task, inputs, tile, first, results);
  for (int t = 0; t < Tokens; ++t) {
    for (int part = 0; part < kParts; ++part) write(task, tile * kTile, part, first + t, results[t][part]);
  }
}

template <Form F, int Tokens>
void tile_rows(const TileTask &task, const Layout &layout, const SalientInputs &inputs, int64_t tile, int64_t first) {
  constexpr int kAtOnce = parts_at_once(Tokens);
  const int32_t group = task.matrix->group;
  Reals acc[Tokens][kParts];
  for (auto &row : acc) {
    for (Reals &part : row) part = all_reals(0.0f);
  }
  const int8_t *x[Tokens];
  for (int t = 0; t < Tokens; ++t) x[t] = task.codes[first + t];
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group at = group_at(layout, tile, g);
    for (int from = 0; from < kParts; from += kAtOnce) {
      TileDot<kAtOnce> dots[Tokens][dots_of(F)][chains_of<Tokens>];
      dot_group<F, Tokens>(at.codes.from(from * kPartBytes), from == 0, x, group / kBlockColumns, dots);
      for (int part = 0; part < kAtOnce; ++part) {
        const GroupReals reals = reals_at<F>(at, from + part);
        for (int t = 0; t < Tokens; ++t) {
          Ints sums[dots_of(F)];
          for (int dot = 0; dot < dots_of(F); ++dot) {
            sums[dot] = dots[t][dot][0].part[part].sums;
            for (int c = 1; c < chains_of<Tokens>; ++c) {
              sums[dot] = add_ints(sums[dot], dots[t][dot][c].part[part].sums);
            }
          }
          Reals &sum = acc[t][from + part];
          sum = add_group<F>(sum, layout.header, sums, reals, task.scales[first + t][g]);
        }
      }
    }
    for (int t = 0; t < Tokens; ++t) x[t] += group;
  }
  write_tile<Tokens>(task, layout.header.unit, inputs, tile, first, acc);
}

// Forms with several sets of codes need as many sums for each row.
template <Form F> constexpr int rows_at_once = dots_of(F) > kManyDots ? kTokens / 2 : kTokens;

} // namespace

void packed_tiles(const TileTask &task) {
  const Layout layout = layout_of(*task.matrix);
  const SalientInputs inputs(task);
  const bool plain = layout.header.high == 16 && layout.header.low == 1;
  with_form(form_of(*task.matrix, plain), [&](auto form) {
    constexpr Form kForm = decltype(form)::value;
    for (int64_t tile = task.first; tile < task.end; ++tile) {
      if (task.delta != nullptr && tile == task.first) ask_for_salient(*task.delta, tile);
      if (task.delta != nullptr && tile + 1 < task.end) ask_for_salient(*task.delta, tile + 1);
      for_each_part<rows_at_once<kForm>>(task.count, [&](int64_t first, auto count) __attribute__((noinline)) {
        tile_rows<kForm, decltype(count)::value>(task, layout, inputs, tile, first);
      });
    }
  });
}

} // namespace MOESTRO_ISA
} // namespace moestro
