// A transformer decoder on packed rows. A call runs layer after layer up to routed experts whose planes are not known to
// be in memory: those the caller computes, and calls again.
//
// Nothing large is allocated per step: all buffers are the caller's, who also keeps whatever a descriptor points at.
#pragma once

#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "allowance.h"
#include "fetching.h"
#include "known_experts.h"
#include "layers.h"
#include "variants.h"

namespace moestro {

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
  // Which rows are of fine-tunes, ascending; and ids [rows] by which their embeddings are looked up, where those of the
  // base are looked up by others (null: by the same).
  std::vector<RowRun> runs = {};
  const int64_t *variant_ids = nullptr;
  // What every MoE layer routes [MoE layers, rows, picks], whatever its router says; null: what the router says.
  const int64_t *given_ids = nullptr;
  const float *given_weights = nullptr;
};

class Decoder {
public:
  Decoder(const Weight &embedding, const Norm &norm, const Weight &head, const Rotation &rotation,
          const Workspace &workspace, int64_t blocks, int64_t block_size);
  Decoder(const Decoder &) = delete;
  Decoder &operator=(const Decoder &) = delete;

  // Throws std::invalid_argument when the layer does not fit the model or the workspace.
  void add(const Layer &layer);

  // Where experts of MoE layer `moe` lie, as the caller finds out; it outlives the decoder.
  void know(int64_t moe, KnownExperts &experts);

  // Has steps of a single row of the base read experts that are not known, where `fetching` can, which outlives the
  // decoder; null: no step does. `look_up` is called now and then while nothing comes, and may throw.
  void fetch(Fetching *fetching, std::function<void()> look_up);

  // Has steps of a single row of the base compute experts at the levels in memory where `allowance`, which outlives the
  // decoder, allows it; null: no step does.
  void spend(Allowance *allowance) { allowance_ = allowance; }

  // What the fine-tune in a slot changes; null empties the slot. Ends the step. Layers are added before.
  // Throws std::invalid_argument when a change does not fit the decoder; the slot is as it was then.
  void set_variant(int32_t slot, const Variant *variant);

  // Begins a step: the residual becomes the embeddings of its tokens. A row's result depends on its own fine-tune only.
  // Throws std::invalid_argument when a token, sequence, position, block or fine-tune does not exist, or one sequence is
  // of two fine-tunes; nothing is touched then.
  void begin(const Step &step);

  // Has every layer of steps with few rows ask the router of the next MoE layer what it would pick if the hidden state
  // stayed as it is: `candidates` ids for each row, in falling order, in `ids` [known_rows, candidates], which outlives
  // the decoder; null: nobody is asked. run() then comes back at layers where one of a row's first `telling` of these
  // (at most as many as it picks) is not known.
  void look_ahead(int64_t *ids, int64_t candidates, int64_t telling);

  // Rows of `ids` that hold what was looked ahead at the layer that run() has come back at; 0: nothing was.
  int64_t seen_rows() const { return seen_rows_; }

  // Goes on with the step up to the next experts that are not known, or those of MoE layer `stop`, and returns the
  // number of their MoE layer; their input is in workspace.hidden, their ids and weights at their place. Returns the
  // number of MoE layers at the end. `delta` [rows, width]: their weighted sums, to go on with (null at the start of a
  // step); it lives until the next call of run() or logits() has returned.
  int64_t run(const float *delta, int64_t stop = -1);

  // out [count, vocabulary]: logits of some of the step's rows, in any order, after all layers.
  void logits(const int64_t *rows, int64_t count, float *out);

  // Seconds so far in matrix products and attention, and in experts, with the waits of `fetch`.
  double kernel_seconds() const { return kernel_seconds_; }
  double experts_seconds() const { return experts_seconds_; }

private:
  struct Window {
    int64_t rows;
    std::vector<RowGroup> groups;
  };

  static void require(bool good, const std::string &what);
  void check_weight(const Weight &weight, int64_t outputs, int64_t inputs, const char *name) const;
  void check_flat(const Weight &weight) const;
  void check_quantised(int64_t inputs) const;
  void check_mlp(const Mlp &mlp) const;
  void check_runs(const Step &step) const;
  void check_variant_ids(const Step &step, const RowRun &run) const;
  // The products of a few matrices with the same rows, which are quantised at most once; then what fine-tunes change of
  // them. `part` is the change in a layer, null of the head.
  struct Product {
    const Weight &weight;
    float *y;
    Change VariantLayer::*part;
  };
  using Products = std::initializer_list<Product>;
  void project(const float *x, int64_t rows, const std::vector<Segment> &segments, Products products);
  void project(const float *x, Products products) { project(x, step_.rows, segments_, products); }
  const Change &change_of(const Segment &segment, const Product &product) const;
  void embed(const Step &step);
  void embed_variant(const Segment &segment);
  void place_qkv(const Layer &layer, float *q, float *k, float *v);
  const VariantLayer &changed(const Segment &segment) const;
  void attend(const Layer &layer, float *query);
  void run_mlp(const Mlp &mlp);
  void run_layer(const Layer &layer, const float *delta);
  void route(const Layer &layer, int64_t moe);
  int64_t run_on(const float *delta, int64_t stop, bool fetch);
  bool run_experts(int64_t moe);
  bool run_lower(int64_t moe);
  RoutedRows routed_rows(int64_t moe) const;
  bool fetches() const;
  bool fetch_experts(int64_t moe);
  void ask_router(size_t layer, int64_t *ids, int64_t candidates);
  size_t next_routed() const;
  bool lacks_ahead(int64_t moe);
  void add_norm(const float *delta, Norm VariantLayer::*part, const Norm &norm);
  AttentionArgs attention_args(const Layer &layer, float *query) const;
  const std::vector<RowGroup> &groups_of(const Layer &layer) const;

  Weight embedding_, head_;
  Norm norm_;
  Rotation rotation_;
  Workspace workspace_;
  int64_t width_, blocks_, block_size_;
  std::vector<Layer> layers_;
  std::vector<KnownExperts *> known_; // by MoE layer; null: none
  Fetching *fetching_ = nullptr;
  Allowance *allowance_ = nullptr;
  std::function<void()> look_up_;
  std::vector<int64_t> looked_; // of the next router, while fetching
  std::map<int32_t, std::unique_ptr<const Variant>> variants_; // by slot
  std::vector<Window> windows_; // of the step: one entry for each window that layers have
  Step step_{};
  std::vector<Segment> segments_; // all rows of the step
  size_t layer_ = 0, next_layer_ = 0; // of the step: that which runs, and the next
  int64_t next_moe_ = 0;
  const float *delta_ = nullptr; // what the last layer has left to be added
  int64_t *ahead_ids_ = nullptr; // where what is looked ahead goes; null: nothing is
  int64_t ahead_candidates_ = 0, ahead_telling_ = 0, seen_rows_ = 0;
  double kernel_seconds_ = 0, experts_seconds_ = 0;
};

} // namespace moestro
