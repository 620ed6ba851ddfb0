#include "module_reads.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "read_queue.h"

namespace nb = nanobind;

namespace moestro {
namespace {

Arrival arrival_of(int64_t turn, int64_t expert, const std::vector<int64_t> &planes) {
  if (planes.size() > kPlanes) throw std::invalid_argument("arrivals: a chain has too many planes");
  Arrival arrival{turn, expert, {}};
  std::copy(planes.begin(), planes.end(), arrival.planes);
  return arrival;
}

// Whom to tell, in which of its turns: an expert comes with the read, its planes at these addresses.
using Notice = std::tuple<Arrivals *, int64_t, int64_t, std::vector<int64_t>>;
using Read = std::tuple<int64_t, int, int64_t, int64_t, uint64_t, bool, std::optional<Notice>>;

void push(ReadQueue &queue, const std::vector<Read> &reads) {
  std::vector<QueuedRead> queued;
  for (const auto &[id, file, offset, bytes, address, urgent, notice] : reads) {
    QueuedRead read{id, file, offset, bytes, address, urgent};
    if (notice) {
      read.arrivals = std::get<0>(*notice);
      read.arrival = arrival_of(std::get<1>(*notice), std::get<2>(*notice), std::get<3>(*notice));
    }
    queued.push_back(read);
  }
  queue.push(queued);
}

} // namespace

void add_reads(nb::module_ &m) {
  nb::class_<Arrivals>(m, "Arrivals")
      .def(nb::init<>())
      .def("begin", &Arrivals::begin)
      .def(
          "come",
          [](Arrivals &arrivals, int64_t turn, int64_t expert, const std::vector<int64_t> &planes) {
            arrivals.come(arrival_of(turn, expert, planes));
          },
          nb::arg("turn"), nb::arg("expert"), nb::arg("planes"))
      .def("fail", &Arrivals::fail)
      .def("count", &Arrivals::count);
  nb::class_<ReadQueue::Request>(m, "ReadRequest")
      .def_ro("ids", &ReadQueue::Request::ids)
      .def_ro("filled", &ReadQueue::Request::filled)
      .def_ro("begun", &ReadQueue::Request::begun)
      .def_ro("ended", &ReadQueue::Request::ended);
  nb::class_<ReadQueue::Stats>(m, "ReadStats")
      .def_ro("requests", &ReadQueue::Stats::requests)
      .def_ro("busy", &ReadQueue::Stats::busy)
      .def_ro("slowest", &ReadQueue::Stats::slowest)
      .def_ro("others", &ReadQueue::Stats::others);
  nb::class_<ReadQueue>(m, "ReadQueue")
      .def(nb::init<int64_t, int64_t>(), nb::arg("request_bytes"), nb::arg("piece_bytes"))
      .def("push", &push, nb::arg("reads"))
      .def("newest", &ReadQueue::newest)
      .def("promote", &ReadQueue::promote, nb::arg("id"))
      .def("remove", &ReadQueue::remove, nb::arg("id"))
      .def("start", &ReadQueue::start)
      .def("tried",
           [](ReadQueue &queue) {
             const nb::gil_scoped_release release;
             return queue.tried();
           })
      .def("next",
           [](ReadQueue &queue) {
             const nb::gil_scoped_release release;
             return queue.next();
           })
      .def("done", &ReadQueue::done, nb::arg("request"))
      .def("close", &ReadQueue::close)
      .def("join", &ReadQueue::join, nb::call_guard<nb::gil_scoped_release>())
      .def("stats", &ReadQueue::stats);
}

} // namespace moestro
