from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moestro.memory.arena import Arena, Slot, extent_bytes_for

PAGE = 4096


def test_slots_are_given_until_the_arena_is_full() -> None:
    arena = Arena(10 * PAGE, 4 * PAGE, [2 * PAGE])
    slots = [arena.alloc(2 * PAGE) for _ in range(5)]
    assert sorted(slot.offset for slot in slots if slot) == [0, 2 * PAGE, 4 * PAGE, 6 * PAGE, 8 * PAGE]
    assert arena.alloc(2 * PAGE) is None
    assert arena.capacity(2 * PAGE) == 5
    assert arena.used_bytes == 10 * PAGE


def test_a_plane_gets_the_smallest_class_that_holds_it() -> None:
    arena = Arena(64 * PAGE, 8 * PAGE, [4 * PAGE, PAGE])
    small, large = arena.alloc(PAGE), arena.alloc(PAGE + 1)
    assert small is not None
    assert small.nbytes == PAGE
    assert large is not None
    assert large.nbytes == 4 * PAGE
    assert large.extent != small.extent
    with pytest.raises(AssertionError, match="no slot class"):
        arena.alloc(5 * PAGE)


def test_an_arena_smaller_than_an_extent_serves_what_fits() -> None:
    arena = Arena(3 * PAGE, 512 * PAGE, [2 * PAGE, 4 * PAGE])
    assert (arena.capacity(2 * PAGE), arena.capacity(4 * PAGE)) == (1, 0)
    assert arena.alloc(4 * PAGE) is None
    assert arena.alloc(2 * PAGE) == Slot(0, 2 * PAGE, 0)


def test_an_extent_changes_class_only_when_empty() -> None:
    arena = Arena(4 * PAGE, 4 * PAGE, [PAGE, 2 * PAGE])
    first, second = arena.alloc(PAGE), arena.alloc(PAGE)
    assert first
    assert second
    arena.free(first)
    assert arena.alloc(2 * PAGE) is None
    arena.free(second)
    assert arena.alloc(2 * PAGE) is not None


def test_the_fullest_extent_is_filled_first() -> None:
    arena = Arena(8 * PAGE, 4 * PAGE, [PAGE])
    slots = [arena.alloc(PAGE) for _ in range(8)]
    for index in (0, 4, 5):  # one free slot in extent 0, two in extent 1
        slot = slots[index]
        assert slot is not None
        arena.free(slot)
    refilled = arena.alloc(PAGE)
    assert refilled is not None
    assert refilled.extent == 0


def test_a_slot_is_freed_once() -> None:
    arena = Arena(4 * PAGE, 4 * PAGE, [PAGE])
    slot = arena.alloc(PAGE)
    assert slot
    arena.free(slot)
    with pytest.raises(AssertionError, match="not in use"):
        arena.free(slot)


def test_an_empty_arena_gives_nothing() -> None:
    arena = Arena(0, PAGE, [PAGE])
    assert arena.alloc(PAGE) is None
    assert arena.capacity(PAGE) == 0


@pytest.mark.parametrize("sizes", [[], [0], [PAGE + 1], [-PAGE]])
def test_slot_sizes_are_whole_pages(sizes: list[int]) -> None:
    with pytest.raises(AssertionError):
        Arena(PAGE, PAGE, sizes)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_extents_hold_every_class_and_waste_least(pages: list[int]) -> None:
    sizes = [count * PAGE for count in pages]
    extent = extent_bytes_for(sizes)
    assert extent % PAGE == 0
    few = 8 * max(sizes) if len(set(sizes)) > 1 else 2 << 20
    assert extent >= max(min(2 << 20, few), *sizes)
    assert extent <= 4 * max(2 << 20, *sizes)
    if len(set(sizes)) == 1:
        assert extent % sizes[0] == 0


def test_extents_of_nested_planes_waste_nothing() -> None:
    extent = extent_bytes_for([128 * PAGE, 64 * PAGE, 32 * PAGE])
    assert extent == 512 * PAGE


def test_a_class_that_is_added_gets_empty_extents_as_others_do() -> None:
    arena = Arena(8 * PAGE, 4 * PAGE, [2 * PAGE])
    assert arena.alloc(2 * PAGE) is not None
    arena.add_class(3 * PAGE)
    assert arena.slot_sizes == (2 * PAGE, 3 * PAGE)
    slot = arena.alloc(3 * PAGE)
    assert slot is not None
    assert slot.extent == 1
    assert arena.alloc(3 * PAGE) is None
    assert arena.used_by(3 * PAGE) == 3 * PAGE
    arena.free(slot)
    arena.add_class(3 * PAGE)
    assert arena.alloc(2 * PAGE) is not None
    assert arena.alloc(2 * PAGE) is not None


class ArenaMachine(RuleBasedStateMachine):
    """Any sequence of alloc and free against the plainest model: the list of slots in use."""

    @initialize(
        classes=st.sets(st.integers(1, 6), min_size=1, max_size=3),
        extent_pages=st.integers(6, 14),
        pages=st.integers(0, 60),
    )
    def start(self, classes: set[int], extent_pages: int, pages: int) -> None:
        self.sizes = sorted(count * PAGE for count in classes)
        self.extent_bytes = extent_pages * PAGE
        self.nbytes = pages * PAGE + 100
        self.arena = Arena(self.nbytes, self.extent_bytes, self.sizes)
        self.used: list[Slot] = []
        self.open = -(-self.nbytes // self.extent_bytes)

    def extent_size(self, extent: int) -> int:
        return min(self.extent_bytes, self.nbytes - extent * self.extent_bytes)

    def must_succeed(self, size: int) -> bool:
        for extent in range(self.open):
            users = [slot for slot in self.used if slot.extent == extent]
            room = self.extent_size(extent) // size
            if room and (not users or (users[0].nbytes == size and len(users) < room)):
                return True
        return False

    @rule(choice=st.integers(0, 2), less=st.integers(0, PAGE - 1))
    def alloc(self, choice: int, less: int) -> None:
        size = self.sizes[choice % len(self.sizes)]
        possible = self.must_succeed(size)
        slot = self.arena.alloc(size - less)
        assert (slot is not None) == possible
        if slot is not None:
            assert slot.nbytes == size
            self.used.append(slot)

    @rule(pages=st.integers(0, 70))
    def resize(self, pages: int) -> None:
        self.arena.resize(pages * PAGE)
        whole = -(-self.nbytes // self.extent_bytes)
        self.open = whole if pages * PAGE >= self.nbytes else min(whole, pages * PAGE // self.extent_bytes)
        assert self.arena.nbytes == sum(self.extent_size(extent) for extent in range(self.open))
        assert all(self.arena.is_open(slot) == (slot.extent < self.open) for slot in self.used)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.arena.free(self.used.pop(data.draw(st.integers(0, len(self.used) - 1))))

    @precondition(lambda self: self.used)
    @rule()
    def free_everything_in_an_extent(self) -> None:
        extent = self.used[0].extent
        for slot in [slot for slot in self.used if slot.extent == extent]:
            self.arena.free(slot)
        self.used = [slot for slot in self.used if slot.extent != extent]

    @invariant()
    def slots_are_apart_aligned_and_inside(self) -> None:
        end = 0
        for slot in sorted(self.used, key=lambda slot: slot.offset):
            assert slot.offset >= end
            assert slot.offset % PAGE == 0
            end = slot.offset + slot.nbytes
            start = slot.extent * self.extent_bytes
            assert start <= slot.offset
            assert end <= start + self.extent_size(slot.extent)

    @invariant()
    def an_extent_has_one_class(self) -> None:
        for extent in {slot.extent for slot in self.used}:
            assert len({slot.nbytes for slot in self.used if slot.extent == extent}) == 1

    @invariant()
    def the_books_agree(self) -> None:
        assert self.arena.used_bytes == sum(slot.nbytes for slot in self.used)
        taken = [slot for extent in range(-(-self.nbytes // self.extent_bytes)) for slot in self.arena.taken(extent)]
        assert sorted(taken, key=hash) == sorted(self.used, key=hash)


ArenaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestArenaMachine = ArenaMachine.TestCase
