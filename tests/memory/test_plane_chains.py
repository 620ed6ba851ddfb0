"""Chains of several planes: handed out whole, read only where something is missing, never in each other's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.cache_bench import Shelf, chain, flat, until
from memory.plane_file import PAGE, PlaneFile, write_plane_file
from moestro.errors import BudgetError, PlaneReadError
from moestro.keys import PlaneKey

CHAIN = (2, 1, 1)


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    return write_plane_file(tmp_path_factory.mktemp("planes") / "chains.bin", 24, [CHAIN])


@pytest.fixture
def shelf(planes: PlaneFile) -> Iterator[Shelf]:
    """Room for eight chains."""
    made = Shelf(planes, 32)
    yield made
    made.disk.open.set()
    made.engine.close()


def test_a_chain_that_is_there_in_part_reads_only_the_rest(shelf: Shelf) -> None:
    shelf.run(chain(3, depth=1))
    assert shelf.reads() == [(0, 3, 0)]
    assert shelf.run(chain(3)) == [[3]]
    assert shelf.reads() == [(0, 3, 1), (0, 3, 2)]
    assert (shelf.cache.stats.hits, shelf.cache.stats.misses) == (0, 2)
    assert shelf.run(chain(3), chain(3, depth=2)) == [[3, 3]]
    assert shelf.reads() == []
    assert (shelf.cache.stats.hits, shelf.cache.stats.misses) == (2, 2)


def test_whole_hits_come_at_once_while_the_others_load(shelf: Shelf) -> None:
    shelf.run(chain(0), chain(1))
    shelf.run(chain(2, depth=2))
    shelf.disk.open.clear()
    with shelf.cache.stream([chain(2), chain(1), chain(4), chain(0)]) as batches:
        assert [index for index, _ in next(batches)] == [1, 3]
        shelf.disk.open.set()
        until(lambda: not shelf.cache._loading)
        assert [index for index, _ in next(batches)] == [0, 2]
        assert list(batches) == []


def test_chains_get_their_slots_whole_and_in_order(planes: PlaneFile) -> None:
    shelf = Shelf(planes, 8)  # an extent for each class: two bases, four upper planes
    assert sorted(flat(shelf.run(*(chain(expert) for expert in range(10))))) == list(range(10))
    assert shelf.reads() == [key for expert in range(10) for key in chain(expert)]
    shelf.engine.close()


def test_planes_of_the_same_class_make_room(shelf: Shelf) -> None:
    """A plane of another class would take the whole extent with it."""
    for expert in range(8):
        shelf.run(chain(expert))
    for expert in (8, 9, 10):
        shelf.run(chain(expert))
        assert shelf.cache.resident() == {key for one in range(expert - 7, expert + 1) for key in chain(one)}
    assert shelf.cache.stats.evictions == 9


def test_a_class_that_has_too_little_takes_an_extent(shelf: Shelf) -> None:
    shelf.run(*(chain(expert, depth=1) for expert in range(16)))
    assert shelf.arena.used_by(2 * PAGE) == 32 * PAGE
    for _ in range(3):
        for expert in range(4):
            shelf.run(chain(expert))
    shelf.reads()
    shelf.run(*(chain(expert) for expert in range(4)))
    assert shelf.reads() == []


def test_planes_scattered_over_all_extents_are_given_up(planes: PlaneFile) -> None:
    """The upper planes of one expert in different extents leave none for its base."""
    shelf = Shelf(planes, 8)
    shelf.run(*(((0, expert, 1),) for expert in range(8)))  # upper planes fill both extents
    shelf.run(((0, 0, 2),))  # in the first extent, in the place of (0, 0, 1)
    shelf.run(((0, 7, 1),), ((0, 0, 2),))
    assert (0, 7, 1) in shelf.cache.resident()
    wanted = ((0, 7, 1), (0, 0, 2), (0, 5, 0))
    assert shelf.run(wanted) == [[7]]
    assert shelf.cache.resident() == set(wanted)
    shelf.engine.close()


def test_too_little_room_for_one_chain_is_said(planes: PlaneFile) -> None:
    shelf = Shelf(planes, 4)
    with pytest.raises(BudgetError, match="at least enough for one expert"):
        shelf.run(chain(0))
    assert shelf.run(chain(0, depth=1)) == [[0]]
    shelf.engine.close()


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_a_plane_in_the_middle_of_a_chain_is_named(shelf: Shelf, plane: int) -> None:
    shelf.disk.broken = {shelf.planes.extents[(0, 5, plane)].offset}
    with pytest.raises(PlaneReadError, match=f"Plane {plane} of expert 5 of MoE layer 0") as failure:
        shelf.run(chain(4), chain(5), chain(6))
    assert failure.value.key == (0, 5, plane)
    until(lambda: not shelf.cache._loading)
    assert not any(held.leases for held in shelf.cache._planes.by_key.values())
    if plane:
        assert shelf.run(chain(5, depth=plane)) == [[5]]
    shelf.disk.broken.clear()
    shelf.disk.reads.clear()
    assert shelf.run(chain(5)) == [[5]]
    assert (0, 5, plane) in shelf.reads()


def test_a_damaged_plane_in_the_middle_of_a_chain_is_named(planes: PlaneFile, tmp_path: Path) -> None:
    file = tmp_path / "damaged.bin"
    content = bytearray(planes.path.read_bytes())
    content[planes.extents[(0, 5, 1)].offset + 100] ^= 1
    file.write_bytes(content)
    extents = {key: type(one)(file, one.offset, one.nbytes, one.checksum) for key, one in planes.extents.items()}
    shelf = Shelf(PlaneFile(file, extents, planes.contents), 32)
    with pytest.raises(PlaneReadError, match=r"Plane 1 of expert 5 .* checksum") as failure:
        shelf.run(chain(4), chain(5))
    assert failure.value.key == (0, 5, 1)
    assert sorted(flat(shelf.run(chain(4), chain(5, depth=1)))) == [4, 5]
    shelf.engine.close()


def test_an_abandoned_stream_frees_chains_that_are_half_there(shelf: Shelf) -> None:
    shelf.disk.open.clear()
    with shelf.cache.stream([chain(expert) for expert in range(12)]):
        shelf.disk.begun.acquire()
    shelf.disk.open.set()
    until(lambda: not shelf.cache._loading)
    assert shelf.reads() == list(chain(0))  # in one request, which had begun
    assert not any(held.leases for held in shelf.cache._planes.by_key.values())


def test_planes_of_a_number_are_dropped_and_read_again(shelf: Shelf) -> None:
    shelf.run(chain(0), chain(1))
    gone: list[PlaneKey] = []
    shelf.cache.on_gone = gone.append
    shelf.reads()
    shelf.cache.drop(1)
    assert sorted(gone) == [(0, 0, 1), (0, 1, 1)]
    assert shelf.cache.stats.evictions == 0
    shelf.run(chain(0), chain(1))
    assert shelf.reads() == [(0, 0, 1), (0, 1, 1)]


def test_a_read_under_way_is_waited_for_before_it_is_dropped(shelf: Shelf) -> None:
    shelf.disk.open.clear()
    shelf.cache.prefetch([(0, 0, 0), (0, 0, 1), (0, 0, 2)])
    shelf.disk.begun.acquire()
    threading.Timer(0.05, shelf.disk.open.set).start()
    shelf.cache.drop(0)
    shelf.cache.settle()
    assert shelf.cache.resident() == {(0, 0, 1), (0, 0, 2)}


def test_an_arena_is_cut_anew(shelf: Shelf) -> None:
    shelf.run(chain(0), chain(1))
    shelf.cache.recut(2 * PAGE, [PAGE, 2 * PAGE])
    assert shelf.cache.extent_bytes == 2 * PAGE
    assert shelf.cache.resident() == set()
    assert shelf.cache.nbytes == 32 * PAGE
    assert sorted(flat(shelf.run(chain(0), chain(1), chain(2)))) == [0, 1, 2]
    shelf.cache.resize(5 * PAGE)
    assert shelf.cache.nbytes == 4 * PAGE
    assert sorted(flat(shelf.run(chain(0), chain(1)))) == [0, 1]
