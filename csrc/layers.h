// What a decoder layer consists of, as it is stored.
#pragma once

#include "packed.h"
#include "rows.h"

namespace moestro {

// A dense matrix [outputs, inputs] as it is stored.
struct Weight {
  enum class Kind : int { none = -1, f32 = 0, bf16 = 1, f16 = 2, flat8 = 3, flat4 = 4 };

  Kind kind = Kind::none;
  const void *data = nullptr; // of a flat matrix its region (see packed.h)
  int64_t outputs = 0, inputs = 0;
  int32_t group = 0; // of a flat matrix
  const float *bias = nullptr; // [outputs]; null: none
};

inline bool there(const Weight &weight) { return weight.kind != Weight::Kind::none; }
inline bool flat(const Weight &weight) {
  return weight.kind == Weight::Kind::flat8 || weight.kind == Weight::Kind::flat4;
}
// Inputs that share a scale. Matrices that share their input share its quantised rows: each width has one group.
inline int32_t group_of(int64_t columns) { return columns % 128 == 0 ? 128 : (columns % 64 == 0 ? 64 : 32); }
inline DType type_of(const Weight &weight) { return static_cast<DType>(weight.kind); }

// down(silu(gate(x)) * up(x)), times sigmoid(scale(x)) where there is a scale.
struct Mlp {
  Weight gate, up, down, scale;
};

struct Layer {
  Norm input_norm{}, post_norm{};
  Weight q, k, v, o;
  Norm q_norm{}, k_norm{};
  float clip = __builtin_inff();
  int64_t heads = 0, heads_kv = 0, head_dim = 0;
  KvTarget keys{}, values{}; // pools [blocks, heads_kv, block_size, head_dim]
  const float *sinks = nullptr; // [heads]; null: none
  float scale = 1.0f, softcap = 0.0f;
  int64_t window = 0;
  Mlp mlp; // a dense layer's, or the shared expert; its result is added to the residual
  Weight router; // none: a dense layer
  Routing routing = Routing::softmax_then_pick;
};

} // namespace moestro
