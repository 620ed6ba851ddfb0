"""Planes of several sizes in one arena: which ones may leave for which need."""

from __future__ import annotations

from moestro.keys import PlaneKey
from moestro.memory.arena import Arena
from moestro.memory.planes import EvictableView, HeldPlane, Planes

PAGE = 4096


class Shelf:
    """An arena of 4-page extents with slots of one, two and four pages; planes are added by number of pages."""

    def __init__(self, pages: int) -> None:
        self.arena = Arena(pages * PAGE, 4 * PAGE, [PAGE, 2 * PAGE, 4 * PAGE])
        self.planes = Planes(self.arena)

    def add(self, expert: int, pages: int) -> HeldPlane:
        slot = self.arena.alloc(pages * PAGE)
        assert slot is not None
        plane = HeldPlane((0, expert, 0), slot, pages * PAGE, step=1)
        self.planes.add(plane)
        return plane

    def evictable(self, pages: int, keep: tuple[PlaneKey, ...] = ()) -> set[int]:
        view = EvictableView(self.planes, pages * PAGE, keep)
        listed = {key[1] for key in view}
        assert listed == {key[1] for key in self.planes.by_key if key in view}
        return listed


def test_a_plane_of_the_same_class_leaves_alone() -> None:
    shelf = Shelf(8)
    first, second = shelf.add(0, 2), shelf.add(1, 2)
    assert shelf.evictable(2) == {0, 1}
    assert shelf.planes.to_evict_for(2 * PAGE, first) == [first]
    second.leases = 1
    assert shelf.evictable(2) == {0}


def test_for_another_class_the_whole_extent_must_leave() -> None:
    shelf = Shelf(8)
    first, second = shelf.add(0, 2), shelf.add(1, 2)  # extent 0
    third = shelf.add(2, 2)  # extent 1
    assert shelf.evictable(4) == {0, 1, 2}
    assert shelf.planes.to_evict_for(4 * PAGE, second) == [first, second]
    assert shelf.planes.to_evict_for(PAGE, third) == [third]
    first.leases = 1
    assert shelf.evictable(4) == {2}
    assert shelf.evictable(4, keep=((0, 2, 0),)) == set()


def test_an_extent_too_short_for_the_need_is_no_help() -> None:
    shelf = Shelf(6)
    shelf.add(0, 4)
    shelf.add(1, 2)  # in the last extent, of two pages
    assert shelf.evictable(4) == {0}
    assert shelf.evictable(2) == {0, 1}


def test_what_is_kept_keeps_its_extent() -> None:
    shelf = Shelf(8)
    shelf.add(0, 2)
    shelf.add(1, 2)
    assert shelf.evictable(2, keep=((0, 0, 0),)) == {1}
    assert shelf.evictable(4, keep=((0, 0, 0),)) == set()


def test_the_unknown_is_not_evictable_and_sizes_are_those_of_slots() -> None:
    shelf = Shelf(8)
    plane = shelf.add(0, 3)
    view = EvictableView(shelf.planes, PAGE, ())
    assert (0, 9, 0) not in view
    assert "banana" not in view
    assert view.nbytes(plane.key) == 4 * PAGE
    shelf.planes.remove(plane)
    assert plane.key not in view
    assert list(view) == []
