from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from memory.cache_bench import Bench, experts_of, plane, until
from memory.plane_file import PAGE, PlaneFile
from moestro.errors import BudgetError, PlaneReadError
from moestro.keys import PlaneKey
from moestro.policy import LRU, Evictable, Need


def test_every_distinct_key_comes_once_with_its_bytes(make: Callable[..., Bench]) -> None:
    bench = make(8)
    assert sorted(bench.run(3, 1, 3, 2, 1)) == [1, 2, 3]
    stats = bench.cache.stats
    assert (stats.hits, stats.misses, stats.bytes_read, stats.evictions) == (0, 3, 6 * PAGE, 0)
    assert bench.run(2, 5, 1) == [2, 1, 5]
    stats = bench.cache.stats
    assert (stats.hits, stats.misses, stats.bytes_read) == (2, 4, 8 * PAGE)
    assert bench.run() == []


def test_hits_come_while_misses_load(make: Callable[..., Bench]) -> None:
    bench = make(8)
    bench.run(0, 1)
    bench.disk.open.clear()
    wanted = (4, 0, 5, 1)
    with bench.cache.stream([(plane(expert),) for expert in wanted]) as batches:
        assert [wanted[index] for index, _ in next(batches)] == [0, 1]  # all hits at once
        until(lambda: bench.read_experts() == [0, 1, 4])  # under way before the first yield
        before = bench.cache.stats.stall_seconds
        threading.Timer(0.1, bench.disk.open.set).start()
        assert experts_of(batches, wanted) == [4, 5]
    assert 0.05 < bench.cache.stats.stall_seconds - before < 5


def test_a_stream_of_hits_does_not_stall(make: Callable[..., Bench]) -> None:
    bench = make(8)
    bench.run(0, 1)
    before = bench.cache.stats.stall_seconds
    bench.run(0, 1)
    assert bench.cache.stats.stall_seconds == before > 0


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_more_misses_than_slots(make: Callable[..., Bench], slots: int) -> None:
    bench = make(slots)
    for _ in range(2):
        assert sorted(bench.run(*range(16))) == list(range(16))
    stats = bench.cache.stats
    assert stats.hits + stats.misses == 32
    assert stats.bytes_read == stats.misses * 2 * PAGE
    assert stats.evictions == stats.misses - slots


def test_as_many_reads_as_slots_are_issued_before_the_first_batch(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.disk.open.clear()
    with bench.cache.stream([(plane(expert),) for expert in range(5)]) as batches:
        assert len(bench.engine._in_flight) == 3
        bench.disk.open.set()
        bench.settle()
        assert bench.read_experts() == [0, 1, 2]  # all slots leased: no read without a slot
        assert [index for index, _ in next(batches)] == [0, 1, 2]  # whatever has arrived by then
        bench.settle()
        assert bench.read_experts() == [0, 1, 2]
        last = next(batches)  # ends the leases: two more
        until(lambda: bench.read_experts() == [0, 1, 2, 3, 4])
        assert [index for batch in (last, *batches) for index, _ in batch] == [3, 4]


def test_a_leased_plane_keeps_its_place(make: Callable[..., Bench]) -> None:
    bench = make(2)
    with bench.cache.stream([(plane(0),)]) as batches:
        [(_, (offset,))] = next(batches)
        assert bench.cache.prefetch([plane(expert) for expert in range(1, 6)]) == 1
        bench.settle()
        assert bench.cache.prefetch([plane(expert) for expert in range(2, 6)]) == 1  # in the place of 1
        bench.settle()
        assert bytes(bench.buffer.view(offset, 2 * PAGE)) == bench.planes.contents[plane(0)]
        assert bench.residents() == {0, 2}
        with pytest.raises(StopIteration):
            next(batches)
    bench.run(3, 4)
    assert bench.residents() == {3, 4}


def test_the_least_recently_used_leaves(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.run(0, 1, 2)
    bench.run(0)
    bench.run(3)
    assert bench.residents() == {0, 2, 3}


def test_the_policy_sees_demand_order_and_every_event(make: Callable[..., Bench]) -> None:
    events: list[tuple[str, int]] = []

    class Spy(LRU):
        def on_load(self, key: PlaneKey, nbytes: int) -> None:
            assert nbytes == 2 * PAGE
            events.append(("load", key[1]))
            super().on_load(key, nbytes)

        def on_use(self, key: PlaneKey) -> None:
            events.append(("use", key[1]))
            super().on_use(key)

        def on_evict(self, key: PlaneKey) -> None:
            events.append(("evict", key[1]))
            super().on_evict(key)

        def victim(self, need: Need, evictable: Evictable) -> PlaneKey | None:
            events.append(("urgent" if need.urgent else "may wait", need.key[1]))
            assert need.nbytes == 2 * PAGE
            assert all(evictable.nbytes(key) == 2 * PAGE for key in evictable)
            return super().victim(need, evictable)

    bench = make(2, Spy())
    bench.run(1, 0)
    bench.cache.prefetch([plane(2)])
    bench.settle()
    bench.run(2, 3)
    assert events == [
        *[("use", 1), ("use", 0), ("load", 1), ("load", 0)],
        *[("may wait", 2), ("evict", 1), ("load", 2)],
        *[("use", 2), ("use", 3), ("urgent", 3), ("evict", 0), ("load", 3)],
    ]


def test_a_policy_that_gives_up_a_leased_plane_is_caught(make: Callable[..., Bench]) -> None:
    class Careless(LRU):
        def victim(self, _need: Need, _evictable: Evictable) -> PlaneKey | None:
            return plane(0)

    bench = make(1, Careless())
    with bench.cache.stream([(plane(0),)]) as batches:
        next(batches)
        with pytest.raises(AssertionError, match="may not leave"):
            bench.cache.prefetch([plane(1)])


def test_a_failed_read_is_raised_and_leaves_the_cache_sound(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.disk.broken = {bench.offset_of(1)}
    with pytest.raises(PlaneReadError, match=r"Plane 0 of expert 1 of MoE layer 0 .*Input/output error"):
        bench.run(0, 1, 2, 3, 4, 5)
    bench.settle()
    assert 1 not in bench.residents()
    assert bench.arena.used_bytes == len(bench.residents()) * 2 * PAGE
    assert sorted(bench.run(7, 8, 9)) == [7, 8, 9]  # all three slots can be had
    bench.disk.broken.clear()
    assert bench.run(1) == [1]


def test_hits_are_not_harmed_by_an_earlier_failure(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.run(0)
    bench.disk.broken = {bench.offset_of(1)}
    with pytest.raises(PlaneReadError):
        bench.run(1, 0)
    assert bench.run(0, 2) == [0, 2]


def test_an_exception_in_the_consumer_ends_all_leases(make: Callable[..., Bench]) -> None:
    bench = make(3)

    def consume() -> None:
        with bench.cache.stream([(plane(expert),) for expert in range(6)]) as batches:
            for _ in batches:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert sorted(bench.run(10, 11, 12)) == [10, 11, 12]


def test_an_abandoned_stream_cancels_what_has_not_begun(make: Callable[..., Bench]) -> None:
    bench = make(4)
    bench.disk.open.clear()
    with bench.cache.stream([(plane(expert),) for expert in range(4)]):
        bench.disk.begun.acquire()
    bench.disk.open.set()
    bench.settle()
    assert bench.read_experts() == [0]
    assert bench.residents() == {0}


def test_a_plane_nobody_can_locate_ends_the_stream_cleanly(make: Callable[..., Bench]) -> None:
    bench = make(1)
    with pytest.raises(KeyError):
        bench.run(0, 99)
    assert bench.run(1) == [1]
    bench.cache.clear()


def test_a_closed_engine_ends_the_stream_cleanly(make: Callable[..., Bench]) -> None:
    bench = make(2)
    bench.run(0)
    bench.engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        bench.run(0, 1)
    assert bench.arena.used_bytes == 2 * PAGE
    assert bench.run(0) == [0]


def test_closing_the_engine_wakes_a_waiting_consumer(make: Callable[..., Bench]) -> None:
    bench = make(4)
    bench.disk.open.clear()
    with bench.cache.stream([(plane(0),), (plane(1),)]) as batches:
        bench.disk.begun.acquire()
        closing = threading.Thread(target=bench.engine.close)
        threading.Timer(0.05, closing.start).start()
        with pytest.raises(PlaneReadError, match="closed"):
            next(batches)
    bench.disk.open.set()
    until(lambda: not closing.is_alive())


def test_without_a_slot_that_can_be_freed_nobody_waits_for_ever(make: Callable[..., Bench]) -> None:
    with pytest.raises(BudgetError, match="No slot"):
        make(0).run(1)
    bench = make(1)
    with bench.cache.stream([(plane(0),)]) as outer:
        next(outer)
        with pytest.raises(BudgetError, match="No slot"):
            bench.run(1)
    assert bench.run(1) == [1]


def test_streams_may_be_nested_and_share_planes(make: Callable[..., Bench]) -> None:
    bench = make(3)
    bench.disk.open.clear()
    with bench.cache.stream([(plane(0),), (plane(1),)]) as outer:
        threading.Timer(0.05, bench.disk.open.set).start()
        assert sorted(bench.run(1, 0)) == [0, 1]
        assert sorted(experts_of(outer, (0, 1))) == [0, 1]
    assert bench.read_experts() == [0, 1]


def test_clear_forgets_everything_and_waits_for_what_has_begun(make: Callable[..., Bench]) -> None:
    bench = make(4)
    bench.run(0)
    bench.disk.open.clear()
    bench.cache.prefetch([plane(1), plane(2)])
    until(lambda: 1 in bench.read_experts())
    threading.Timer(0.05, bench.disk.open.set).start()
    bench.cache.clear()
    assert bench.residents() == set()
    assert bench.arena.used_bytes == 0
    assert bench.read_experts() == [0, 1]
    assert bench.cache.stats.evictions == 0
    assert sorted(bench.run(0, 1, 2, 3)) == [0, 1, 2, 3]
    with bench.cache.stream([(plane(0),)]), pytest.raises(AssertionError, match="within a stream"):
        bench.cache.clear()


def test_stats_are_a_copy(make: Callable[..., Bench]) -> None:
    bench = make(4)
    before = bench.cache.stats
    bench.run(0)
    assert before.misses == 0
    assert bench.cache.stats.misses == 1


def test_a_missing_file_is_a_plane_that_cannot_be_read(uniform_planes: PlaneFile, tmp_path: Path) -> None:
    extent = uniform_planes.extents[plane(0)]
    moved = PlaneFile(tmp_path / "gone.bin", {plane(0): type(extent)(tmp_path / "gone.bin", 0, 2 * PAGE, 0)}, {})
    bench = Bench(moved, 1)
    with pytest.raises(PlaneReadError, match=r"gone\.bin"):
        bench.run(0)
    bench.engine.close()
