#include "module_reads.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "fetching.h"
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

Shelf shelf_of(int file, int64_t bytes, const std::vector<int64_t> &offsets, const std::vector<int64_t> &inner) {
  if (inner.size() > kPlanes) throw std::invalid_argument("fetching: a chain has too many planes");
  Shelf shelf{file, bytes, offsets, {}};
  shelf.inner.fill(-1);
  std::copy(inner.begin(), inner.end(), shelf.inner.begin());
  return shelf;
}

void lend(Fetching &fetching, const std::vector<std::tuple<int64_t, int64_t, int64_t, double>> &slots,
          const std::vector<int> &idle, const std::vector<int> &reading, uintptr_t worths, double rise) {
  if (idle.size() != reading.size()) throw std::invalid_argument("fetching: limits differ in candidates");
  std::vector<LentSlot> lent;
  for (const auto &[address, moe, expert, worth] : slots) lent.push_back({address, moe, expert, worth});
  fetching.lend(std::move(lent), idle, reading, {reinterpret_cast<const double *>(worths), rise});
}

void add_fetching(nb::module_ &m) {
  nb::enum_<Fetched::Kind>(m, "FetchKind")
      .value("DEMAND", Fetched::Kind::demand)
      .value("AHEAD", Fetched::Kind::ahead)
      .value("IN_TIME", Fetched::Kind::ahead_in_time)
      .value("LATE", Fetched::Kind::ahead_late)
      .value("TAKEN_BACK", Fetched::Kind::taken_back);
  nb::class_<Fetching>(m, "Fetching")
      .def("__init__",
           [](Fetching *self, ReadQueue &queue, uintptr_t unread, int64_t layers, int64_t experts) {
             new (self) Fetching(queue, reinterpret_cast<uint8_t *>(unread), layers, experts);
           },
           nb::arg("queue"), nb::arg("unread"), nb::arg("layers"), nb::arg("experts"), nb::keep_alive<1, 2>())
      .def(
          "shelve",
          [](Fetching &fetching, int64_t moe, int file, int64_t bytes, const std::vector<int64_t> &offsets,
             const std::vector<int64_t> &inner) { fetching.shelve(moe, shelf_of(file, bytes, offsets, inner)); },
          nb::arg("moe_layer"), nb::arg("file"), nb::arg("bytes"), nb::arg("offsets"), nb::arg("inner"))
      .def("lend", &lend, nb::arg("slots"), nb::arg("idle") = nb::list(), nb::arg("reading") = nb::list(),
           nb::arg("worths") = 0, nb::arg("rise") = 0.0)
      .def_prop_ro("fetched",
                   [](const Fetching &fetching) {
                     std::vector<std::tuple<int64_t, int64_t, int64_t, Fetched::Kind, double, double, double>> all;
                     for (const Fetched &one : fetching.fetched()) {
                       all.emplace_back(one.moe, one.expert, one.slot, one.kind, one.asked, one.begun, one.ended);
                     }
                     return all;
                   })
      .def_prop_ro("waits", [](const Fetching &fetching) {
        std::vector<std::tuple<double, double, double, bool>> all;
        for (const FetchWait &one : fetching.waits()) all.emplace_back(one.begun, one.ended, one.read, one.late);
        return all;
      })
      .def_prop_ro("visits", [](const Fetching &fetching) {
        std::vector<std::tuple<int64_t, double, bool, std::vector<int64_t>>> all;
        for (const FetchVisit &one : fetching.visits()) {
          all.emplace_back(one.moe, one.routed, one.reading, one.candidates);
        }
        return all;
      });
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
  add_fetching(m);
}

} // namespace moestro
