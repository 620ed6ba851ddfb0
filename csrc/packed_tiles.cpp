// Tiles of a quantised matrix times rows of quantised activations.
//
// Few rows: straight from the planes, codes never leave the registers. Many: a group's codes are unpacked once into the
// first-level cache, then used by a few rows at a time.
#include "packed_layout.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int kGroupQuads = kMostGroup / 4;
// How far ahead of use planes are asked for.
constexpr int64_t kAhead = 1024;

MOESTRO_INLINE void write(const TileTask &task, float unit, int64_t row, int part, int64_t t, Reals acc) {
  const int64_t n = row + part * kPartRows;
  acc = mul_reals(acc, all_reals(unit));
  float *out = task.out[t] + (n - task.first_row);
  const int64_t left = task.matrix->rows - n;
  if (left >= kPartRows) {
    store_reals(out, task.bias == nullptr ? acc : add_reals(acc, load_reals(task.bias + n)));
    return;
  }
  float all[kPartRows];
  store_reals(all, acc);
  for (int64_t i = 0; i < left; ++i) out[i] = task.bias == nullptr ? all[i] : all[i] + task.bias[n + i];
}

template <Form F> MOESTRO_INLINE void ask_for(const GroupCodes &at, int64_t block) {
  const auto ask = [&](int plane, int lines) {
    const uint8_t *p = at.plane[plane] + block * lines * kChunk + kAhead;
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + i * kChunk);
  };
  ask(0, F == Form::flat8 ? 8 : (F == Form::flat4 ? 4 : 2));
  if constexpr (F == Form::nested3 || F == Form::nested4 || F == Form::nested8 || is_signs<F>) ask(1, 1);
  if constexpr (F == Form::nested4 || F == Form::nested8 || F == Form::signs4 || F == Form::signs8) ask(2, 1);
  if constexpr (F == Form::nested8 || F == Form::signs8) ask(3, 4);
}

template <int Tokens> constexpr int chains_of = Tokens == 1 ? kChains : 1;

// Sums of one group's codes with `Tokens` rows: dots[t][dot][chain].
template <Form F, int Tokens>
MOESTRO_INLINE void direct_group(const GroupCodes &codes, const int8_t *const *x, int64_t blocks,
                                 TileDot (&dots)[Tokens][dots_of(F)][chains_of<Tokens>]) {
  for (auto &row : dots) {
    for (auto &dot : row) {
      for (TileDot &chain : dot) chain.clear();
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    ask_for<F>(codes, block);
    const auto use = [&](auto dot, int quad, const Codes &unpacked) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const auto a = load_quad(x[t] + block * kBlockColumns + 4 * quad);
        dots[t][decltype(dot)::value][quad % chains_of<Tokens>].template add<F == Form::flat8>(unpacked, a);
      }
    };
    unpack_block<F>(codes, block, use);
    for (auto &row : dots) {
      for (auto &dot : row) {
        for (TileDot &chain : dot) chain.flush();
      }
    }
  }
}

template <Form F, int Tokens> void direct_tile(const TileTask &task, const Layout &layout, int64_t tile) {
  const int32_t group = task.matrix->group;
  Reals acc[Tokens][kParts];
  for (auto &row : acc) {
    for (Reals &part : row) part = all_reals(0.0f);
  }
  const int8_t *x[Tokens];
  for (int t = 0; t < Tokens; ++t) x[t] = task.codes[t];
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group at = group_at(layout, tile, g);
    TileDot dots[Tokens][dots_of(F)][chains_of<Tokens>];
    direct_group<F, Tokens>(at.codes, x, group / kBlockColumns, dots);
    for (int part = 0; part < kParts; ++part) {
      const GroupReals reals = reals_at<F>(at, part);
      for (int t = 0; t < Tokens; ++t) {
        Ints sums[dots_of(F)];
        for (int dot = 0; dot < dots_of(F); ++dot) {
          sums[dot] = dots[t][dot][0].part[part].sums;
          for (int c = 1; c < chains_of<Tokens>; ++c) sums[dot] = add_ints(sums[dot], dots[t][dot][c].part[part].sums);
        }
        acc[t][part] = add_group<F>(acc[t][part], layout.header, sums, reals, task.scales[t][g]);
      }
    }
    for (int t = 0; t < Tokens; ++t) x[t] += group;
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int part = 0; part < kParts; ++part) {
      write(task, layout.header.unit, tile * kTileRows16, part, t, acc[t][part]);
    }
  }
}

// The sums of `Tokens` rows with unpacked codes of `Tiles` tiles, sums[t][tile][dot]. Codes lie quad by quad, tile by
// tile.
template <bool Signed, int Tokens, int Tiles>
void dot_codes(const uint8_t *codes, const int8_t *const *x, int64_t quads, int32_t *sums, int64_t stride) {
  TileDot dots[Tokens][Tiles];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < Tiles; ++i) dots[t][i].clear();
  }
  for (int64_t q = 0; q < quads; q += kBlockQuads) {
#pragma GCC unroll 8
    for (int64_t step = q; step < q + kBlockQuads; ++step) {
      Codes c[Tiles];
#pragma GCC unroll 2
      for (int i = 0; i < Tiles; ++i) c[i] = load_codes(codes + (step * Tiles + i) * kChunk);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const auto a = load_quad(x[t] + 4 * step);
#pragma GCC unroll 2
        for (int i = 0; i < Tiles; ++i) dots[t][i].template add<Signed>(c[i], a);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
      for (int i = 0; i < Tiles; ++i) dots[t][i].flush();
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < Tiles; ++i) {
      for (int part = 0; part < kParts; ++part) {
        store_ints(sums + (t * Tiles + i) * stride + part * kPartRows, dots[t][i].part[part].sums);
      }
    }
  }
}

// What lies in a thread's scratch: a group's codes [dot][quad][tile], sums of the rows so far [row][tile][16].
struct Scratch {
  alignas(64) uint8_t codes[kMostDots * kGroupQuads * kBlockTiles * kChunk];
  alignas(64) float sums[kMostRows * kBlockTiles * kTileRows16];
};

template <Form F, int Tiles>
void cached_tiles(const TileTask &task, const Layout &layout, int64_t tile, Scratch &scratch) {
  constexpr int kDots = dots_of(F);
  const int32_t group = task.matrix->group;
  const int64_t quads = group / 4, dot_bytes = quads * Tiles * kChunk;
  std::memset(scratch.sums, 0, static_cast<size_t>(task.count) * Tiles * kTileRows16 * sizeof(float));
  for (int64_t g = 0; g < layout.groups; ++g) {
    Group at[Tiles];
    for (int i = 0; i < Tiles; ++i) {
      at[i] = group_at(layout, tile + i, g);
      for (int64_t block = 0; block < group / kBlockColumns; ++block) {
        ask_for<F>(at[i].codes, block);
        unpack_block<F>(at[i].codes, block,
                        [&](auto dot, int quad, const Codes &unpacked) __attribute__((always_inline)) {
                          const int64_t place = (block * kBlockQuads + quad) * Tiles + i;
                          store_codes(scratch.codes + decltype(dot)::value * dot_bytes + place * kChunk, unpacked);
                        });
      }
    }
    for_each_part<kBlockTokens>(task.count, [&](int64_t first, auto count) {
      constexpr int kTokens = decltype(count)::value;
      alignas(64) int32_t sums[kTokens * Tiles * kDots * kTileRows16];
      const int8_t *x[kTokens];
      for (int t = 0; t < kTokens; ++t) x[t] = task.codes[first + t] + g * group;
      for (int dot = 0; dot < kDots; ++dot) {
        dot_codes<F == Form::flat8, kTokens, Tiles>(scratch.codes + dot * dot_bytes, x, quads, sums + dot * kTileRows16,
                                                    kDots * kTileRows16);
      }
      for (int i = 0; i < Tiles; ++i) {
        for (int part = 0; part < kParts; ++part) {
          const GroupReals reals = reals_at<F>(at[i], part);
          for (int t = 0; t < kTokens; ++t) {
            Ints dots[kDots];
            for (int dot = 0; dot < kDots; ++dot) {
              dots[dot] = load_ints(sums + ((t * Tiles + i) * kDots + dot) * kTileRows16 + part * kPartRows);
            }
            float *acc = scratch.sums + ((first + t) * Tiles + i) * kTileRows16 + part * kPartRows;
            store_reals(acc, add_group<F>(load_reals(acc), layout.header, dots, reals, task.scales[first + t][g]));
          }
        }
      }
    });
  }
  for (int64_t t = 0; t < task.count; ++t) {
    for (int i = 0; i < Tiles; ++i) {
      for (int part = 0; part < kParts; ++part) {
        const Reals acc = load_reals(scratch.sums + (t * Tiles + i) * kTileRows16 + part * kPartRows);
        write(task, layout.header.unit, (tile + i) * kTileRows16, part, t, acc);
      }
    }
  }
}

template <Form F> void run(const TileTask &task, Scratch &scratch) {
  const Layout layout = layout_of(*task.matrix);
  if (task.count <= kDirectTokens) {
    with_count<kDirectTokens>(task.count, [&](auto count) {
      for (int64_t tile = task.first; tile < task.end; ++tile) {
        direct_tile<F, decltype(count)::value>(task, layout, tile);
      }
    });
    return;
  }
  int64_t tile = task.first;
  for (; tile + kBlockTiles <= task.end; tile += kBlockTiles) cached_tiles<F, kBlockTiles>(task, layout, tile, scratch);
  for (; tile < task.end; ++tile) cached_tiles<F, 1>(task, layout, tile, scratch);
}

} // namespace

size_t packed_tile_scratch() { return sizeof(Scratch); }

void packed_tiles(const TileTask &task, char *scratch) {
  with_form(form_of(*task.matrix),
            [&](auto form) { run<decltype(form)::value>(task, *reinterpret_cast<Scratch *>(scratch)); });
}

} // namespace MOESTRO_ISA
} // namespace moestro
