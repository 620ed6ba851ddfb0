#include "module_lowest.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace moestro {
namespace {

constexpr int64_t kBlock = 16;

template <class T> using Values = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The least values found so far, at most `wanted`, as a heap with the greatest of them on top.
template <class T> class Least {
public:
  explicit Least(size_t wanted) : wanted_(wanted) {}

  // What is not below it is not among the least. inf is no value.
  T limit() const { return limit_; }

  void add(T value, int64_t place) {
    if (found_.size() == wanted_) {
      std::pop_heap(found_.begin(), found_.end());
      found_.pop_back();
    }
    found_.emplace_back(value, place);
    std::push_heap(found_.begin(), found_.end());
    if (found_.size() == wanted_) limit_ = found_.front().first;
  }

  std::vector<int64_t> places() {
    std::sort_heap(found_.begin(), found_.end());
    std::vector<int64_t> places;
    places.reserve(found_.size());
    for (const auto &one : found_) places.push_back(one.second);
    return places;
  }

private:
  size_t wanted_;
  T limit_ = std::numeric_limits<T>::infinity();
  std::vector<std::pair<T, int64_t>> found_;
};

template <class T> std::vector<int64_t> lowest(Values<T> values, Values<T> bars, int64_t wanted) {
  const int64_t count = static_cast<int64_t>(values.shape(0));
  if (static_cast<int64_t>(bars.shape(0)) != count) throw std::invalid_argument("lowest: as many bars as values");
  if (wanted < 1) throw std::invalid_argument("lowest: none are wanted");
  const T *value = values.data(), *bar = bars.data();
  Least<T> least(static_cast<size_t>(wanted));
  for (int64_t first = 0; first < count; first += kBlock) {
    const T limit = least.limit();
    // Nearly all blocks have none: whole blocks without a branch are the compiler's to turn into vectors.
    if (first + kBlock <= count) {
      int32_t below = 0;
      for (int64_t i = first; i < first + kBlock; ++i) below += value[i] + bar[i] < limit;
      if (!below) continue;
    }
    for (int64_t i = first; i < std::min(first + kBlock, count); ++i) {
      if (value[i] + bar[i] < least.limit()) least.add(value[i] + bar[i], i);
    }
  }
  return least.places();
}

} // namespace

void add_lowest(nb::module_ &m) {
  m.def("lowest", &lowest<float>, nb::arg("values").noconvert(), nb::arg("bars").noconvert(), nb::arg("wanted"));
  m.def("lowest", &lowest<double>, nb::arg("values").noconvert(), nb::arg("bars").noconvert(), nb::arg("wanted"));
}

} // namespace moestro
