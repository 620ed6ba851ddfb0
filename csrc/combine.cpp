#include "combine.h"

#include "thread_pool.h"

namespace moestro {
namespace {

constexpr int64_t kFewTokens = 4; // not worth waking a worker for

struct Combining {
  const float *outputs, *weights;
  float *out;
  int64_t picks, width;
};

void combine_token(void *context, int64_t token, char *) {
  const Combining &job = *static_cast<const Combining *>(context);
  const float *weights = job.weights + token * job.picks;
  const float *rows = job.outputs + token * job.picks * job.width;
  float *__restrict out = job.out + token * job.width;
  for (int64_t h = 0; h < job.width; ++h) out[h] = rows[h] * weights[0];
  for (int64_t k = 1; k < job.picks; ++k) {
    const float *row = rows + k * job.width;
    for (int64_t h = 0; h < job.width; ++h) out[h] += row[h] * weights[k];
  }
}

} // namespace

void combine(const float *outputs, const float *weights, float *out, int64_t tokens, int64_t picks, int64_t width) {
  Combining job{outputs, weights, out, picks, width};
  pool().run(tokens, 0, tokens > kFewTokens, combine_token, &job);
}

} // namespace moestro
