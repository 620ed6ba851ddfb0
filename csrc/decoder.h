// A transformer decoder on packed rows. A call runs layer after layer up to routed experts whose planes are not known to
// be in memory: those the caller computes, and calls again.
//
// Nothing is allocated per step: all buffers are the caller's, who also keeps whatever a descriptor points at.
#pragma once

#include <initializer_list>
#include <vector>

#include "known_experts.h"
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

// Memory of a step of up to `rows` rows.
struct Workspace {
  float *residual, *hidden; // [rows, width]
  float *scratch;           // [rows, scratch_width]
  void *quantised;          // quantised_size bytes, 64-byte aligned: rows that flat matrices are multiplied with
  int64_t *ids;             // [MoE layers, rows of the step, picks], and room for as many with `rows` rows
  float *weights;           // likewise
  float *outputs;           // [known_rows * picks, width]
  int64_t rows, scratch_width, picks, moe_layers;
  int64_t known_rows; // of a step at most, for experts to be computed here
  size_t quantised_size;
};

// What turns queries and keys: cosines and sines [positions, half], for heads of twice the width.
struct Rotation {
  const float *cos, *sin;
  int64_t positions, half;
};

// The packed rows of a step.
struct Step {
  const int64_t *token_ids; // [rows]
  const int32_t *block_table, *row_sequence, *row_position;
  int64_t rows, sequences, max_blocks;
};

class Decoder {
public:
  Decoder(const Weight &embedding, const Norm &norm, const Weight &head, const Rotation &rotation,
          const Workspace &workspace, int64_t blocks, int64_t block_size);

  // Throws std::invalid_argument when the layer does not fit the model or the workspace.
  void add(const Layer &layer);

  // Where experts of MoE layer `moe` lie, as the caller finds out; it outlives the decoder.
  void know(int64_t moe, const KnownExperts &experts);

  // Begins a step: the residual becomes the embeddings of its tokens.
  // Throws std::invalid_argument when a token, sequence, position or block does not exist; nothing is touched then.
  void begin(const Step &step);

  // Goes on with the step up to the next experts that are not known, and returns the number of their MoE layer; their
  // input is in workspace.hidden, their ids and weights at their place. Returns the number of MoE layers at the end.
  // `delta` [rows, width]: their weighted sums, to go on with (null at the start of a step); it lives until the next
  // call of run() or logits() has returned.
  int64_t run(const float *delta);

  // out [count, vocabulary]: logits of some of the step's rows, after all layers. Ends the step: the residual has been
  // used up.
  void logits(const int64_t *rows, int64_t count, float *out);

  // Seconds so far in matrix products and attention, and in experts.
  double kernel_seconds() const { return kernel_seconds_; }
  double experts_seconds() const { return experts_seconds_; }

private:
  struct Window {
    int64_t rows;
    std::vector<RowGroup> groups;
  };

  void check_weight(const Weight &weight, int64_t outputs, int64_t inputs, const char *name) const;
  void check_flat(const Weight &weight) const;
  void check_together(std::initializer_list<const Weight *> weights) const;
  void check_mlp(const Mlp &mlp) const;
  // The products of a few matrices with the same rows, which are quantised at most once.
  struct Product {
    const Weight &weight;
    float *y;
  };
  void project(const float *x, int64_t rows, std::initializer_list<Product> products);
  void embed(const Step &step);
  void attend(const Layer &layer, float *query);
  void run_mlp(const Mlp &mlp);
  void run_layer(const Layer &layer, const float *delta);
  void route(const Layer &layer, int64_t moe);
  bool run_experts(int64_t moe);
  void add_norm(const float *delta, const int64_t *pick, const Norm &norm, int64_t rows);
  AttentionArgs attention_args(const Layer &layer, float *query) const;
  const std::vector<RowGroup> &groups_of(const Layer &layer) const;

  Weight embedding_, head_;
  Norm norm_;
  Rotation rotation_;
  Workspace workspace_;
  int64_t width_, blocks_, block_size_;
  std::vector<Layer> layers_;
  std::vector<const KnownExperts *> known_; // by MoE layer; null: none
  std::vector<Window> windows_; // of the step: one entry for each window that layers have
  Step step_{};
  size_t next_layer_ = 0; // of the step
  int64_t next_moe_ = 0;
  const float *delta_ = nullptr; // what the last layer has left to be added
  double kernel_seconds_ = 0, experts_seconds_ = 0;
};

} // namespace moestro
