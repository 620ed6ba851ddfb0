"""Prefetches: behind all demand, never in its way, never read twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from memory.cache_bench import Bench, experts_of, plane
from memory.plane_file import PAGE
from moestro.errors import PlaneReadError
from moestro.keys import PlaneKey
from moestro.policy import LRU, Evictable, Need


def test_a_policy_may_decline_a_prefetch(make: Callable[..., Bench]) -> None:
    class Content(LRU):
        def victim(self, need: Need, evictable: Evictable) -> PlaneKey | None:
            return super().victim(need, evictable) if need.urgent else None

    bench = make(2, Content())
    bench.run(0, 1)
    assert bench.cache.prefetch([plane(2)]) == 0
    bench.run(2)
    assert bench.residents() == {1, 2}


def test_prefetched_planes_are_hits(make: Callable[..., Bench]) -> None:
    bench = make(4)
    assert bench.cache.prefetch([plane(0), plane(1), plane(0)]) == 2
    bench.settle()
    assert bench.cache.prefetch([plane(0)]) == 0
    bench.run(0, 1)
    stats = bench.cache.stats
    assert (stats.prefetches, stats.hits, stats.misses, stats.late_prefetches) == (2, 2, 0, 0)
    assert bench.read_experts() == [0, 1]


def test_a_late_prefetch_is_a_miss_made_urgent_and_read_once(make: Callable[..., Bench]) -> None:
    bench = make(8)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(expert) for expert in (0, 1, 2)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(2),), (plane(3),), (plane(0),)]) as batches:
        bench.disk.open.set()
        assert experts_of(batches, (2, 3, 0)) == [0, 2, 3]
    bench.settle()
    assert bench.read_experts() == [0, 2, 3]
    stats = bench.cache.stats
    assert (stats.hits, stats.misses, stats.late_prefetches, stats.prefetches) == (0, 3, 2, 3)


def test_unused_prefetches_give_way_and_are_counted(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.cache.prefetch([plane(expert) for expert in range(4)])
    bench.settle()
    assert bench.residents() == {0, 1, 2}
    bench.run(0)
    bench.run(3, 4, 5)
    stats = bench.cache.stats
    assert (stats.evictions, stats.wasted_prefetches, stats.wasted_bytes) == (3, 2, 4 * PAGE)


def test_a_prefetch_never_evicts_what_it_prefetches(make: Callable[..., Bench]) -> None:
    bench = make(2)
    bench.run(0, 1)
    assert bench.cache.prefetch([plane(2), plane(0), plane(3)]) == 1
    bench.settle()
    assert bench.residents() == {0, 2}


def test_demand_takes_slots_from_prefetches_that_have_not_begun(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.disk.open.clear()
    bench.cache.prefetch([(1, 0, 0), (1, 1, 0), (1, 2, 0)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(5),), (plane(6),)]) as batches:
        bench.disk.open.set()
        assert experts_of(batches, (5, 6)) == [5, 6]
    assert bench.read_experts() == [0, 5, 6]


def test_the_prefetch_queued_last_is_taken_back_first(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.disk.open.clear()
    bench.cache.prefetch([(1, 0, 0), (1, 1, 0), (1, 2, 0)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(5),)]) as batches:
        bench.disk.open.set()
        assert experts_of(batches, (5,)) == [5]
    bench.settle()
    assert bench.read_experts() == [0, 5, 1]


def test_no_prefetch_takes_the_room_that_demand_waits_for(make: Callable[..., Bench]) -> None:
    bench = make(2)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(0)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(5),), (plane(6),)]) as batches:
        bench.disk.open.set()
        bench.settle()  # the place of 0 could be had now, and 6 has none yet
        assert bench.cache.prefetch([plane(7)]) == 0
        assert experts_of(batches, (5, 6)) == [5, 6]
    assert bench.read_experts() == [0, 5, 6]


def test_demand_waits_for_the_slot_of_a_prefetch_that_has_begun(make: Callable[..., Bench]) -> None:
    bench = make(1)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(0)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(5),)]) as batches:
        threading.Timer(0.05, bench.disk.open.set).start()
        assert experts_of(batches, (5,)) == [5]
    assert bench.residents() == {5}


def test_a_failed_prefetch_is_said_counted_and_tried_again_on_demand(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = make(2)
    bench.disk.broken = {bench.offset_of(1)}
    bench.cache.prefetch([plane(1)])
    bench.settle()
    assert bench.cache.stats.failed_prefetches == 1
    assert "expert 1" in caplog.text
    assert bench.residents() == set()
    assert bench.arena.used_bytes == 0
    with pytest.raises(PlaneReadError):
        bench.run(1)


def test_prefetches_that_the_router_did_not_choose_give_their_slots_back(make: Callable[..., Bench]) -> None:
    bench = make(8)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(expert) for expert in (0, 2, 4, 6)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(4),), (plane(9),)]) as batches:
        assert bench.arena.used_bytes == 3 * 2 * PAGE  # 0 has begun, 4 was chosen, 9 is asked for
        bench.disk.open.set()
        assert experts_of(batches, (4, 9)) == [4, 9]
    bench.settle()
    assert bench.read_experts() == [0, 4, 9]
    stats = bench.cache.stats
    assert (stats.prefetches, stats.cancelled_prefetches, stats.late_prefetches) == (4, 2, 1)
    assert (stats.wasted_prefetches, stats.bytes_read) == (0, 3 * 2 * PAGE)


def test_prefetches_for_other_layers_stay_queued(make: Callable[..., Bench]) -> None:
    bench = make(8)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(0), plane(5), (1, 3, 0)])
    bench.disk.begun.acquire()
    with bench.cache.stream([(plane(1),)]) as batches:
        bench.disk.open.set()
        assert experts_of(batches, (1,)) == [1]
    bench.settle()
    assert bench.read_experts() == [0, 1, 3]
    assert bench.cache.stats.cancelled_prefetches == 1


def test_spared_planes_make_no_room(make: Callable[..., Bench]) -> None:
    bench = make(2)
    bench.run(0, 1)
    assert bench.cache.prefetch([plane(2), plane(3)], spare={plane(0)}) == 1
    bench.settle()
    assert bench.residents() == {0, 2}


def test_whoever_wants_to_know_hears_what_came_ahead_and_where_it_lies(make: Callable[..., Bench]) -> None:
    bench, heard = make(3), []
    bench.cache.on_ahead = heard.append
    bench.run(0)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(1)])
    bench.disk.begun.acquire()
    assert bench.cache.offsets((plane(1),)) is None
    bench.disk.open.set()
    bench.settle()
    assert heard == [plane(1)]
    offsets = bench.cache.offsets((plane(0), plane(1)))
    assert offsets is not None
    assert len(set(offsets)) == 2
    assert bench.cache.offsets((plane(0), plane(2))) is None


def test_what_is_used_without_asking_is_no_waste_and_the_rest_of_its_layer_is_taken_back(
    make: Callable[..., Bench],
) -> None:
    bench = make(4)
    bench.cache.prefetch([(1, 0, 0), (1, 1, 0)])
    bench.settle()
    bench.disk.open.clear()
    bench.cache.prefetch([(1, 2, 0), (1, 3, 0)])
    while not bench.engine._in_flight or bench.disk.reads[-1:] != [bench.offset_of(2)]:
        bench.disk.begun.acquire()
    bench.cache.used(1, np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]))
    assert bench.cache.stats.hits == 1
    assert bench.cache.stats.cancelled_prefetches == 1  # that of 2 had begun
    bench.disk.open.set()
    bench.settle()
    bench.run(4, 5, 6, 7)
    assert bench.cache.stats.wasted_prefetches == 2  # 1 and 2
