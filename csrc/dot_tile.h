// Dot products of a few fp32 rows with a few weight rows, the heart of both kernels.
//
// The order that every path keeps: lane l sums the products of elements l, l + 8, l + 16, ... one after another with
// fused multiply-adds (a length that is no multiple of 8 counts as filled up with zeros), then sum_lanes() adds the
// lanes.
#pragma once

#include "unroll.h"

namespace moestro {
namespace MOESTRO_ISA {

// A tile's sums must fit in the registers: 16 of them, 32 with AVX-512.
#ifdef __AVX512VL__
constexpr int kTileTokens = 6;
constexpr int kTileRows = 4;
#else
constexpr int kTileTokens = 4;
constexpr int kTileRows = 3;
#endif

template <int Tokens, int Rows> struct Tile {
  Vec sums[Tokens][Rows];

  MOESTRO_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) sums[i][j] = zero();
    }
  }

  template <class LoadToken, class LoadRow> MOESTRO_INLINE void step(LoadToken load_token, LoadRow load_row) {
    Vec w[Rows];
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) w[j] = load_row(j);
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; ++i) {
      const Vec x = load_token(i);
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) sums[i][j] = fma(x, w[j], sums[i][j]);
    }
  }

  MOESTRO_INLINE void load_from(const float *lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) sums[i][j] = load(lanes + (i * Rows + j) * kLanes);
    }
  }

  MOESTRO_INLINE void store_to(float *lanes) const {
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) store(lanes + (i * Rows + j) * kLanes, sums[i][j]);
    }
  }

  // out[i * Rows + j]
  MOESTRO_INLINE void total(float *out) const { sum_lanes_of<Tokens * Rows>(&sums[0][0], out); }
};

// Memory that will be needed next: `bytes` of it are asked for, in order of address, while a tile is computed.
//
// Rows are read side by side, which no hardware prefetcher follows well; a stream of prefetches in the order of memory
// is what it knows, and comes within a fifth of a plain read (rows side by side alone: 0.2 to 0.6 of it).
struct Ahead {
  const char *next = nullptr;
  bool near = false; // into the first-level cache, where it must outlive the current tile; else the second
};

// out[i * Rows + j] = dot(x[i], w[j])
template <int Tokens, int Rows, class W>
MOESTRO_INLINE void dot_tile(const float *const *x, const W *const *w, int64_t length, Ahead ahead, float *out) {
  constexpr int64_t kLineBytes = 64, kLine = kLineBytes / sizeof(W);
  Tile<Tokens, Rows> tile;
  tile.clear();
  const auto step_at = [&](int64_t k) __attribute__((always_inline)) {
    tile.step([&](int i) { return load(x[i] + k); }, [&](int j) { return load(w[j] + k); });
  };
  int64_t k = 0;
  const auto steps_with = [&](auto locality) __attribute__((always_inline)) {
    for (const char *p = ahead.next; k + kLine <= length; k += kLine, p += Rows * kLineBytes) {
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) __builtin_prefetch(p + j * kLineBytes, 0, decltype(locality)::value);
#pragma GCC unroll 4
      for (int64_t s = 0; s < kLine; s += kLanes) step_at(k + s);
    }
  };
  if (ahead.next != nullptr) {
    if (ahead.near) {
      steps_with(Count<3>{});
    } else {
      steps_with(Count<2>{});
    }
  }
  for (; k + kLanes <= length; k += kLanes) step_at(k);
  if (k < length) {
    const int64_t left = length - k;
    tile.step([&](int i) { return load_some(x[i] + k, left); }, [&](int j) { return load_some(w[j] + k, left); });
  }
  tile.total(out);
}

} // namespace MOESTRO_ISA
} // namespace moestro
