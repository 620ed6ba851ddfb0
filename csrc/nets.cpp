// The nets' arithmetic. Sums run in one order whatever the vectors' width, so every machine foresees the same.
#include "nets.h"
#include "vector_math.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int64_t kTileVecs = kTileExperts / kLanes;
constexpr int64_t kCacheLine = 64;

float *state_of(const Nets &nets, int64_t place, int64_t layer) {
  return nets.state + (place * nets.shape.layers + layer) * nets.stride;
}

const Float16 *rows_of(const Nets &nets, const NetRole &role, int64_t layer, int64_t expert) {
  const int64_t index = layer * nets.shape.experts + expert;
  return static_cast<const Float16 *>(role.rows) + index * nets.shape.parts() * role.width;
}

MOESTRO_INLINE void scale(float *x, float factor, int64_t count) {
  const Vec by = broadcast(factor);
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, mul(load(x + i), by));
}

// x += factor * y
template <class W> MOESTRO_INLINE void add_scaled(float *x, float factor, const W *y, int64_t count) {
  const Vec by = broadcast(factor);
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, fma(by, load(y + i), load(x + i)));
}

MOESTRO_INLINE void clear(float *x, int64_t count) { std::memset(x, 0, static_cast<size_t>(count) * sizeof(float)); }

void step_history(const NetShape &shape, float *own, const int64_t *ids, const float *weights, float total,
                  int64_t picks) {
  const int64_t experts = shape.experts;
  float *recency = own + shape.averages * experts, *latest = recency + experts;
  for (int64_t a = 0; a < shape.averages; ++a) scale(own + a * experts, shape.decays[a], experts);
  const Vec one = broadcast(1.0f), fade = broadcast(shape.fade);
  for (int64_t e = 0; e < experts; e += kLanes) {
    const Vec before = load(recency + e);
    store(recency + e, div(before, fma(fade, before, one)));
  }
  clear(latest, experts);
  for (int64_t k = 0; k < picks; ++k) {
    for (int64_t a = 0; a < shape.averages; ++a) own[a * experts + ids[k]] += shape.gains[a];
    recency[ids[k]] = 1.0f;
    latest[ids[k]] = weights[k] / total;
  }
}

// They lie apart and are rarely near at hand: on their way all at once, while the history steps.
void fetch_rows(const Nets &nets, const NetRole &role, const NetVisit &visit) {
  const int64_t bytes = nets.shape.parts() * role.width * static_cast<int64_t>(sizeof(Float16));
  for (int64_t k = 0; k < visit.picks; ++k) {
    const char *row = reinterpret_cast<const char *>(rows_of(nets, role, visit.layer, visit.ids[k]));
    for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(row + at);
  }
}

void step_sums(const Nets &nets, const NetRole &role, float *sums, const NetVisit &visit, float total) {
  const NetShape &shape = nets.shape;
  const int64_t width = role.width, averages = shape.averages * width, views = shape.views * width;
  for (int64_t a = 0; a < shape.averages; ++a) scale(sums + a * width, shape.decays[a], width);
  clear(sums + averages, views);
  for (int64_t k = 0; k < visit.picks; ++k) {
    const Float16 *row = rows_of(nets, role, visit.layer, visit.ids[k]);
    for (int64_t a = 0; a < shape.averages; ++a) add_scaled(sums + a * width, shape.gains[a], row + a * width, width);
    add_scaled(sums + averages, visit.weights[k] / total, row + averages, views);
  }
}

void rebuild_sums(const Nets &nets, const NetRole &role, float *own, int64_t layer) {
  const NetShape &shape = nets.shape;
  const int64_t width = role.width, experts = shape.experts;
  const float *latest = own + (shape.averages + 1) * experts;
  float *sums = own + role.at;
  clear(sums, shape.parts() * width);
  for (int64_t e = 0; e < experts; ++e) {
    const Float16 *row = rows_of(nets, role, layer, e);
    for (int64_t a = 0; a < shape.averages; ++a) {
      const float uses = own[a * experts + e];
      if (uses != 0.0f) add_scaled(sums + a * width, uses, row + a * width, width);
    }
    const int64_t views = shape.averages * width;
    if (latest[e] != 0.0f) add_scaled(sums + views, latest[e], row + views, shape.views * width);
  }
}

void follow(const Nets &nets, const NetVisit &visit) {
  float *own = state_of(nets, visit.place, visit.layer);
  for (int64_t row = 0; row < visit.rows; ++row) {
    const int64_t *ids = visit.ids + row * visit.picks;
    const float *weights = visit.weights + row * visit.picks;
    float total = 0.0f;
    for (int64_t k = 0; k < visit.picks; ++k) total += weights[k];
    if (!(total > 1e-20f)) total = 1e-20f;
    for (int64_t role = 0; visit.rows == 1 && role < visit.kept; ++role) fetch_rows(nets, nets.roles[role], visit);
    step_history(nets.shape, own, ids, weights, total, visit.picks);
    for (int64_t role = 0; visit.rows == 1 && role < visit.kept; ++role) {
      step_sums(nets, nets.roles[role], own + nets.roles[role].at, visit, total);
    }
  }
  // Of many rows only the last state is asked for.
  for (int64_t role = 0; visit.rows > 1 && role < visit.kept; ++role) {
    rebuild_sums(nets, nets.roles[role], own, visit.layer);
  }
}

void rebuild(const Nets &nets, int64_t place, int64_t role) {
  for (int64_t layer = 0; layer < nets.shape.layers; ++layer) {
    rebuild_sums(nets, nets.roles[role], state_of(nets, place, layer), layer);
  }
}

// The request's inner layer: the values above 0, moved to the front, and where their lines of the outputs begin.
// Returns how many.
int64_t inner_of(const Nets &nets, const NetQuestion &asked, int64_t request) {
  const NetShape &shape = nets.shape;
  const NetRole &role = nets.roles[asked.role];
  const int64_t width = role.width, layer = asked.layer, place = asked.places[request];
  const float *own = state_of(nets, place, layer), *recency = own + shape.averages * shape.experts;
  float *inner = asked.inner + request * width;
  std::memcpy(inner, role.bias + layer * width, static_cast<size_t>(width) * sizeof(float));
  for (int64_t a = 0; a < shape.averages; ++a) add_scaled(inner, 1.0f, own + role.at + a * width, width);
  for (int64_t v = 0; v < shape.views; ++v) {
    const int64_t seen = ((layer + shape.offsets[v]) % shape.layers + shape.layers) % shape.layers;
    add_scaled(inner, 1.0f, state_of(nets, place, seen) + role.at + (shape.averages + v) * width, width);
  }
  const Float16 *rows = static_cast<const Float16 *>(role.recency) + layer * shape.experts * width;
  for (int64_t e = 0; e < shape.experts; ++e) {
    if (recency[e] != 0.0f) add_scaled(inner, recency[e], rows + e * width, width);
  }
  int64_t count = 0;
  for (int64_t w = 0; w < width; ++w) {
    if (!(inner[w] > 0.0f)) continue;
    asked.lines[request * width + count] = (1 + shape.features() + w) * kTileExperts;
    inner[count++] = inner[w];
  }
  return count;
}

// One request's probabilities that a tile's experts are not used.
MOESTRO_INLINE void unused_in(const NetShape &shape, const Float16 *tile, const float *own, const float *inner,
                              const int64_t *lines, int64_t count, Vec *out) {
  for (int64_t i = 0; i < kTileVecs; ++i) out[i] = load(tile + i * kLanes);
  for (int64_t f = 0; f < shape.features(); ++f) {
    const float *seen = own + f * shape.experts;
    const Float16 *line = tile + (1 + f) * kTileExperts;
    for (int64_t i = 0; i < kTileVecs; ++i) out[i] = fma(load(seen + i * kLanes), load(line + i * kLanes), out[i]);
  }
  for (int64_t w = 0; w < count; ++w) {
    const Vec value = broadcast(inner[w]);
    const Float16 *line = tile + lines[w];
    for (int64_t i = 0; i < kTileVecs; ++i) out[i] = fma(value, load(line + i * kLanes), out[i]);
  }
  const Vec one = broadcast(1.0f);
  for (int64_t i = 0; i < kTileVecs; ++i) out[i] = div(one, add(one, exp(out[i])));
}

void answer(const Nets &nets, const NetQuestion &asked) {
  const NetShape &shape = nets.shape;
  const NetRole &role = nets.roles[asked.role];
  // The number of values is kept behind the last line of each request.
  for (int64_t r = 0; r < asked.count; ++r) asked.lines[asked.count * role.width + r] = inner_of(nets, asked, r);
  const int64_t *counts = asked.lines + asked.count * role.width;
  const int64_t tiles = shape.experts / kTileExperts, step = (1 + shape.features() + role.width) * kTileExperts;
  const Float16 *tile = static_cast<const Float16 *>(role.outputs) + asked.layer * role.horizons * tiles * step;
  const Vec one = broadcast(1.0f);
  for (int64_t place = 0; place < role.horizons * tiles; ++place, tile += step) {
    const int64_t expert = place % tiles * kTileExperts;
    Vec unused[kTileVecs], each[kTileVecs];
    for (int64_t i = 0; i < kTileVecs; ++i) unused[i] = one;
    for (int64_t r = 0; r < asked.count; ++r) {
      const int64_t first = r * role.width;
      const float *own = state_of(nets, asked.places[r], asked.layer) + expert;
      unused_in(shape, tile, own, asked.inner + first, asked.lines + first, counts[r], each);
      for (int64_t i = 0; i < kTileVecs; ++i) unused[i] = mul(unused[i], each[i]);
    }
    float *out = asked.out + place * kTileExperts;
    for (int64_t i = 0; i < kTileVecs; ++i) store(out + i * kLanes, sub(one, unused[i]));
  }
}

} // namespace

const NetTable net_table = {follow, rebuild, answer};

} // namespace MOESTRO_ISA
} // namespace moestro
