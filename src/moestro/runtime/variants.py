"""The variants of a model that is open: which of them are in memory, and who makes room for whom.

Names are looked up by any thread; everything else is for the thread that runs steps, between two of them.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from moestro.errors import BudgetError, PlaneReadError, VariantError
from moestro.keys import FIRST_DELTA, MOST_VARIANTS, PlaneExtent, PlaneKey
from moestro.memory.arena import extent_bytes_for, least_bytes_for
from moestro.memory.budget import format_bytes
from moestro.memory.direct import FileReader
from moestro.memory.pages import round_up
from moestro.memory.plane_cache import PlaneCache
from moestro.policy.keeping.eviction import WorthEviction
from moestro.runtime.batch import BASE, PackedBatch
from moestro.runtime.deltas import StepDeltas
from moestro.runtime.open_variant import OpenVariant
from moestro.runtime.shares import MemoryShares
from moestro.runtime.variant_history import VariantHistories
from moestro.runtime.variant_parts import Wardrobe
from moestro.store.reader import Store
from moestro.store.variant_file import list_variants, open_variant, variant_folder
from moestro.store.variant_manifest import LOW_RANK, VARIANT_NAME

_Identity = tuple[int, int, int]
"""Of the file that describes a variant: another one with its name has another."""


class Follower(Protocol):
    """Is told which variants are in memory."""

    def entered(self, variant: OpenVariant) -> None:
        """The parts of a variant have come into memory; it has a number."""

    def leaving(self, variant: OpenVariant, *, is_gone: bool) -> None:
        """They are about to leave. `is_gone`: the store has that variant no more."""


class Variants:
    """Those of one store. Dense parts are in memory from the first request on, at the expense of experts, until others
    need their place; planes of experts come and go as those of the base do.

    Args:
        chains: of each MoE layer, the bytes of the planes of an expert of the base.
        overhead_bytes: what kernels need for deltas that the plan did not count.
        eviction: is told which variants nobody uses, if there is one.
        native: whether compiled layers compute them, which know no products of thin matrices.
        histories: remember what requests of each variant do, if anybody wants to know.
    """

    def __init__(
        self,
        store: Store,
        *,
        planes: PlaneCache,
        shares: MemoryShares,
        reader: FileReader,
        wardrobe: Wardrobe,
        arena: int,
        chains: Sequence[Sequence[int]],
        overhead_bytes: int,
        eviction: WorthEviction | None,
        histories: VariantHistories | None,
        native: bool = False,
    ) -> None:
        self._store, self._planes, self._shares, self._reader = store, planes, shares, reader
        self._wardrobe, self._arena, self._overhead, self._eviction = wardrobe, arena, overhead_bytes, eviction
        self._native = native
        self._bytes_each = 0 if histories is None else histories.nbytes
        self._chains = tuple(dict.fromkeys(tuple(chain) for chain in chains))
        self._chain_of = [self._chains.index(tuple(chain)) for chain in chains]
        self._serials, self._uses = itertools.count(1), itertools.count(1)
        self._slots: dict[int, OpenVariant] = {}
        self._lock = threading.Lock()  # of the names
        self._named: weakref.WeakValueDictionary[tuple[str, _Identity], OpenVariant] = weakref.WeakValueDictionary()
        self.followers: list[Follower] = [] if histories is None else [histories]

    def names(self) -> tuple[str, ...]:
        """Those in the store now."""
        return list_variants(self._store.path)

    def open(self, name: str) -> OpenVariant:
        """The variant of this name.

        Raises:
            VariantError: there is none, or it is damaged or of another base.
            BudgetError: there can never be room for it.
        """
        with self._lock:
            identity = self._identity(name)
            found = None if identity is None else self._named.get((name, identity))
            if found is None:
                found = OpenVariant(open_variant(self._store, name), next(self._serials), self._reader)
                if identity is not None and identity == self._identity(name):
                    self._named[name, identity] = found
        if self._native and found.stored.manifest.method == LOW_RANK:
            raise VariantError(
                f"The variant {name} is by {LOW_RANK}, which compiled layers do not compute, and this model was opened "
                "before it was there. Open the model again: with such a variant in its store it runs without them."
            )
        if not self._fit([found], [found]):
            raise self._too_large(found)
        return found

    def enter(self, variant: OpenVariant) -> bool:
        """A request begins to run on a variant, which is in memory from now on; False: those that run leave no room.

        Raises:
            BudgetError: nothing runs on any other, and there is none either: the model has been given less memory.
            PlaneReadError: its dense parts cannot be read.
        """
        self.sweep()
        if not variant.running and not self._bring_in(variant):
            return False
        variant.running += 1
        variant.used = next(self._uses)
        self._tell_idle()
        return True

    def enter_by_name(self, name: str) -> int:
        """The number of a variant that is in use until the model is closed, `BASE` for an empty name.

        Raises:
            VariantError, BudgetError, PlaneReadError: as `open` and `enter`.
        """
        if not name:
            return BASE
        variant = self.open(name)
        entered = self.enter(variant)
        assert entered, "others run"
        assert variant.slot is not None
        return variant.slot

    def leave(self, variant: OpenVariant) -> None:
        """A request does not run on a variant any more. One that is gone from the store goes with its last request."""
        assert variant.running > 0
        variant.running -= 1
        if not variant.running and not self._is_current(variant):
            self._forget(variant)
        self._tell_idle()

    def sweep(self) -> None:
        """Forget those that are gone from the store and that nothing runs on."""
        for variant in [one for one in self._slots.values() if not one.running]:
            if not self._is_current(variant):
                self._forget(variant)

    def release(self) -> None:
        """Forget all that nothing runs on."""
        for variant in [one for one in self._slots.values() if not one.running]:
            self._forget(variant)

    def close(self) -> None:
        """Give the memory back; no step may follow."""
        for variant in self._in_memory():
            self._say_leaving(variant)
            self._close_parts(variant)
        self._slots.clear()

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of those in memory, planes of experts left out, by name."""
        return {one.name: one.memory_bytes for one in tuple(self._slots.values()) if one.parts is not None}

    def locate(self, key: PlaneKey) -> PlaneExtent:
        """Where a plane lies on disk, of the base or of a variant that has a number."""
        layer, expert, plane = key
        if plane < FIRST_DELTA:
            return self._store.plane(key)
        return self._slots[plane - FIRST_DELTA].plane(layer, expert)

    def deltas(self, batch: PackedBatch) -> StepDeltas | None:
        """What a step's rows need beside the base; None where they are all the base's."""
        if not batch.runs:
            return None
        return StepDeltas(batch.runs, [self._slots[run.variant] for run in batch.runs], self._arena)

    def wearing(self, variant: int) -> AbstractContextManager[None]:
        """Within, the model has the dense parts of the variant of this number."""
        return nullcontext() if variant == BASE else self._wardrobe.wearing(self._slots[variant].changed)

    def _identity(self, name: str) -> _Identity | None:
        try:
            found = os.stat(variant_folder(self._store.path, name) / VARIANT_NAME)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def _is_current(self, variant: OpenVariant) -> bool:
        with self._lock:
            identity = self._identity(variant.name)
            return identity is not None and self._named.get((variant.name, identity)) is variant

    def _bring_in(self, variant: OpenVariant) -> bool:
        """Make room for one that nothing runs on, and read its dense parts; False where those that run leave none."""
        others = [one for one in self._slots.values() if one.parts is not None and one is not variant]
        running = [variant, *(one for one in others if one.running)]
        idle = sorted((one for one in others if not one.running), key=lambda one: one.used)
        while not self._fit([*running, *idle], running):
            if not idle:
                if len(running) > 1:
                    return False
                raise self._too_large(variant)
            self._put_away(idle.pop(0))
        if variant.slot is None and not self._take_slot(variant):
            return False
        staying = [one for one in [*running, *idle] if one.slot is not None]
        self._cut_for(staying, running)
        self._lend(staying)
        if variant.parts is None:
            self._load(variant)
        return True

    def _load(self, variant: OpenVariant) -> None:
        try:
            variant.parts = variant.load()
        except PlaneReadError:
            self._lend(self._in_memory())
            raise
        variant.changed = self._wardrobe.tensors(variant.parts)
        for one in self.followers:
            one.entered(variant)

    def _in_memory(self) -> list[OpenVariant]:
        return [one for one in self._slots.values() if one.parts is not None]

    def _take_slot(self, variant: OpenVariant) -> bool:
        free = next((slot for slot in range(MOST_VARIANTS) if slot not in self._slots), None)
        if free is None:
            idle = [one for one in self._slots.values() if not one.running]
            if not idle:
                return False
            oldest = min(idle, key=lambda one: one.used)
            free = oldest.slot
            assert free is not None
            self._forget(oldest)
        variant.slot = free
        self._slots[free] = variant
        return True

    def _put_away(self, variant: OpenVariant) -> None:
        """Its dense parts leave memory; its experts' planes stay as long as they are worth it."""
        if variant.parts is None:
            return
        self._say_leaving(variant)
        self._close_parts(variant)
        self._lend(self._in_memory())

    def _say_leaving(self, variant: OpenVariant) -> None:
        is_gone = not self._is_current(variant)
        for one in self.followers:
            one.leaving(variant, is_gone=is_gone)

    @staticmethod
    def _close_parts(variant: OpenVariant) -> None:
        assert variant.parts is not None
        variant.changed = {}
        variant.parts.close()
        variant.parts = None

    def _forget(self, variant: OpenVariant) -> None:
        """Nothing of it stays."""
        self._put_away(variant)
        assert variant.slot is not None
        self._planes.drop(FIRST_DELTA + variant.slot)
        del self._slots[variant.slot]
        variant.slot = None

    def _lend(self, variants: Collection[OpenVariant]) -> None:
        self._shares.lend(self._lent(variants))

    def _lent(self, variants: Collection[OpenVariant]) -> int:
        return sum(one.memory_bytes + self._bytes_each for one in variants) + self._overhead * bool(variants)

    def _fit(self, staying: Collection[OpenVariant], running: Collection[OpenVariant]) -> bool:
        """Whether there is room for dense parts of all that stay, and for an expert with the deltas of all that run."""
        return self._extent_for(staying, running) is not None

    def _extent_for(self, staying: Collection[OpenVariant], running: Collection[OpenVariant]) -> int | None:
        """The first of the sizes that extents may have with which there is room; None where there is none."""
        left = self._shares.left_for_planes(self._lent(staying))
        fitting = (one for one in self._extents(staying) if left // one * one >= self._least(running, one))
        return next(fitting, None)

    def _extents(self, staying: Collection[OpenVariant]) -> list[int]:
        """The sizes that extents may have: what they are, if planes fit into them; what they would best be; the least,
        with which an arena of a few planes does."""
        sizes = self._sizes(staying)
        now = self._planes.extent_bytes
        return [*([now] if sizes[-1] <= now else []), extent_bytes_for(sizes), sizes[-1]]

    def _sizes(self, staying: Collection[OpenVariant]) -> list[int]:
        """Of all planes, ascending."""
        base = {size for chain in self._chains for size in chain}
        return sorted(base | {size for one in staying for size in one.plane_bytes if size})

    def _least(self, running: Collection[OpenVariant], extent: int) -> int:
        """An arena in which an expert has room with the deltas of all that run, and the next one of the base."""
        kinds = {
            (self._chain_of[layer], tuple(sorted(sizes)))
            for layer, sizes in enumerate(zip(*(one.plane_bytes for one in running), strict=True))
        }
        return max(
            round_up(least_bytes_for([*2 * self._chains[chain], *(size for size in sizes if size)], extent), extent)
            for chain, sizes in kinds
        )

    def _cut_for(self, staying: Collection[OpenVariant], running: Collection[OpenVariant]) -> None:
        """Have slots for the planes of all that stay, in other extents if need be."""
        sizes, extent = self._sizes(staying), self._extent_for(staying, running)
        assert extent is not None
        if self._planes.joined:
            self._planes.part(extent, sizes)
        elif extent != self._planes.extent_bytes:
            self._planes.recut(extent, sizes)
        for size in sizes:
            self._planes.serve_planes_of(size)

    def _tell_idle(self) -> None:
        if self._eviction is not None:
            idle = [slot for slot, one in self._slots.items() if not one.running]
            self._eviction.idle = sum(1 << (FIRST_DELTA + slot) for slot in idle)

    def _too_large(self, variant: OpenVariant) -> BudgetError:
        more = min(self._least([variant], extent) for extent in self._extents([variant]))
        short = self._lent([variant]) + more - self._shares.left_for_planes(0)
        needed = self._shares.memory_bytes + short + self._shares.missing_kv_bytes
        return BudgetError(
            f"{format_bytes(self._shares.memory_bytes)} is too little for the variant {variant.name}: beside what the "
            f"model needs it takes {format_bytes(variant.memory_bytes)}, and room for two experts with what it adds to "
            f"them. Open the model with at least {format_bytes(needed)} ({needed} bytes), or with a shorter context "
            "or fewer sequences at once."
        )
