"""Planes of an expert that share a slot: read in one go, there or gone together, and parted for good when asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from memory.cache_bench import Shelf, chain, flat
from memory.plane_file import PAGE, PlaneFile, write_plane_file
from moestro.errors import PlaneReadError

SIZES = (2, 1, 1)
PAGES = sum(SIZES)


def run(shelf: Shelf, *experts: int) -> None:
    """Stream experts, whose bytes are checked."""
    assert sorted(flat(shelf.run(*(chain(expert) for expert in experts)))) == sorted(experts)


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> PlaneFile:
    return write_plane_file(tmp_path_factory.mktemp("planes") / "chains.bin", 12, [SIZES])


@pytest.fixture
def joined(planes: PlaneFile) -> Iterator[Shelf]:
    """Room for four experts."""
    made = Shelf(planes, 4 * PAGES, joined=len(SIZES))
    yield made
    made.engine.close()


def test_an_expert_is_one_read_and_one_plane(joined: Shelf) -> None:
    run(joined, 3, 5)
    assert joined.disk.reads == [joined.planes.extents[0, expert, 0].offset for expert in (3, 5)]
    assert joined.cache.resident() == {(0, 3, 0), (0, 5, 0)}
    assert joined.cache.held([chain(3), chain(4), chain(5)]) == [3, 0, 3]
    joined.check(chain(5), joined.cache.offsets(chain(5)))
    assert joined.cache.offsets(chain(4)) is None
    assert joined.cache.stats.bytes_read == 2 * PAGES * PAGE


def test_it_leaves_whole(joined: Shelf) -> None:
    run(joined, 0, 1, 2, 3)
    run(joined, 4)
    assert joined.cache.resident() == {(0, expert, 0) for expert in (1, 2, 3, 4)}
    stats = joined.cache.stats
    assert (stats.hits, stats.misses, stats.evictions) == (0, 5, 1)
    run(joined, 0, 4)
    assert (joined.cache.stats.hits, joined.cache.stats.misses) == (1, 6)


def test_it_is_read_ahead_whole(joined: Shelf) -> None:
    assert joined.cache.prefetch([*chain(7), *chain(8)]) == 2
    joined.cache.settle()
    run(joined, 7, 8)
    stats = joined.cache.stats
    assert (stats.prefetches, stats.hits, stats.prefetched_bytes) == (2, 2, 2 * PAGES * PAGE)


@pytest.mark.parametrize("plane", range(len(SIZES)))
def test_damage_of_any_plane_is_found(joined: Shelf, plane: int) -> None:
    extents = joined.planes.extents
    damaged = {(0, 6, plane): replace(extents[0, 6, plane], checksum=1)}
    joined.cache.locate = lambda key: damaged.get(key, extents[key])
    expected = rf"Planes 0 to 2 of expert 6 of MoE layer 0 .*: the checksum of plane {plane} is"
    with pytest.raises(PlaneReadError, match=expected) as caught:
        run(joined, 6)
    assert caught.value.key == (0, 6, 0)
    joined.cache.locate = joined.planes.locate
    run(joined, 6)


def test_parted_each_plane_has_a_slot(joined: Shelf) -> None:
    run(joined, 0, 1, 2, 3)
    joined.cache.prefetch(chain(9))
    joined.cache.part(4 * PAGE, [PAGE, 2 * PAGE])
    joined.cache.resize(4 * PAGES * PAGE)
    assert not joined.cache.joined
    assert joined.cache.resident() == set()
    run(joined, 1, 2)
    assert joined.cache.resident() == {*chain(1), *chain(2)}
    with joined.cache.stream([chain(3)[:1]]) as batches:
        assert [len(offsets) for batch in batches for _, offsets in batch] == [1]
    assert joined.cache.held([chain(3), chain(1)]) == [1, 3]
