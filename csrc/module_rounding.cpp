#include "module_rounding.h"

#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "pointer.h"
#include "rounding.h"

namespace nb = nanobind;

namespace moestro {
namespace {

void copy_levels(const std::vector<float> &from, float *to) {
  if (from.size() != kLevels) throw std::invalid_argument("steps and priorities are one for each of the 4 levels");
  for (int level = 0; level < kLevels; ++level) to[level] = from[level];
}

void check_pushed(int pushed) {
  if (pushed < 0 || pushed > kLevels) throw std::invalid_argument("pushed is a number of levels");
}

CodeRule code_rule(const std::vector<uintptr_t> &scales, int64_t groups, const std::vector<float> &steps,
                   const std::vector<float> &priorities, float hi, float lo, bool signs) {
  if (scales.empty() || scales.size() > kLevels) throw std::invalid_argument("scales are of 1 to 4 planes");
  CodeRule rule{};
  for (size_t plane = 0; plane < scales.size(); ++plane) rule.scales[plane] = pointer<const float>(scales[plane]);
  rule.groups = groups;
  copy_levels(steps, rule.steps);
  copy_levels(priorities, rule.priorities);
  rule.hi = hi;
  rule.lo = lo;
  rule.signs = signs;
  return rule;
}

void round_columns(const CodeRule &rule, uintptr_t targets, int64_t target_level_stride, int64_t target_row_stride,
                   uintptr_t group_of, int pushed, uintptr_t pushes, int64_t push_stride, uintptr_t before,
                   uintptr_t changes, uintptr_t codes, uintptr_t nibbles, int64_t rows, int64_t columns) {
  check_pushed(pushed);
  RoundArgs args{};
  args.rule = rule;
  args.targets = pointer<const float>(targets);
  args.target_level_stride = target_level_stride;
  args.target_row_stride = target_row_stride;
  args.group_of = pointer<const int32_t>(group_of);
  args.pushed = pushed;
  args.pushes = pointer<const float>(pushes);
  args.push_stride = push_stride;
  args.before = pointer<const float>(before);
  args.changes = pointer<float>(changes);
  args.codes = pointer<uint8_t>(codes);
  args.nibbles = pointer<uint8_t>(nibbles);
  args.rows = rows;
  args.columns = columns;
  kernels().round_columns(args);
}

void descend(const CodeRule &rule, uintptr_t group_of, int pushed, uintptr_t hessian, uintptr_t aims,
             int64_t aims_stride, uintptr_t values, int64_t values_stride, uintptr_t downhill, int64_t downhill_stride,
             uintptr_t codes, uintptr_t nibbles, int64_t rows, int64_t columns) {
  check_pushed(pushed);
  DescentArgs args{};
  args.rule = rule;
  args.group_of = pointer<const int32_t>(group_of);
  args.pushed = pushed;
  args.hessian = pointer<const float>(hessian);
  args.aims = pointer<const float>(aims);
  args.aims_stride = aims_stride;
  args.values = pointer<float>(values);
  args.values_stride = values_stride;
  args.downhill = pointer<float>(downhill);
  args.downhill_stride = downhill_stride;
  args.codes = pointer<uint8_t>(codes);
  args.nibbles = pointer<uint8_t>(nibbles);
  args.rows = rows;
  args.columns = columns;
  kernels().descend(args);
}

void scale_costs(uintptr_t weights, uintptr_t importance, uintptr_t scales, uintptr_t middles, uintptr_t costs,
                 const std::vector<float> &steps, const std::vector<float> &priorities, float hi, float lo,
                 int64_t tries, int64_t rows, int64_t groups, int64_t group) {
  ScaleCostArgs args{};
  args.weights = pointer<const float>(weights);
  args.importance = pointer<const float>(importance);
  args.scales = pointer<const float>(scales);
  args.middles = pointer<const float>(middles);
  args.costs = pointer<float>(costs);
  copy_levels(steps, args.steps);
  copy_levels(priorities, args.priorities);
  args.hi = hi;
  args.lo = lo;
  args.tries = tries;
  args.rows = rows;
  args.groups = groups;
  args.group = group;
  kernels().scale_costs(args);
}

} // namespace

void add_rounding(nb::module_ &m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<CodeRule>(m, "CodeRule").def(nb::new_(&code_rule));
  m.def("round_columns", &round_columns, release());
  m.def("descend", &descend, release());
  m.def("scale_costs", &scale_costs, release());
}

} // namespace moestro
