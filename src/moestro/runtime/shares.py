"""KV blocks and experts' planes trade places: memory that no request's KV rows need holds experts meanwhile.

The plan gives each of them a part that it can rely on: the experts `plan.arena_bytes`, whatever requests need, and KV
blocks a quarter of one sequence's context. Of the rest KV blocks have what requests need, and the experts what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from moestro.errors import BudgetError
from moestro.memory.budget import format_bytes
from moestro.memory.pages import HUGE_PAGE, PAGE, HostBuffer, round_up
from moestro.memory.plane_cache import PlaneCache
from moestro.runtime.kv import KVPool, blocks_for
from moestro.runtime.plan import Plan

_MOST_TIMES = 16
"""So many times the base's planes are the most that planes of variants are ever given."""


def least_kv_blocks(plan: Plan) -> int:
    """KV blocks that experts never take the place of."""
    return min(plan.kv_blocks, max(1, blocks_for(plan.context) // 4))


def most_arena_bytes(plan: Plan) -> int:
    """What experts get while no request needs KV blocks; `plan.arena_bytes` where there is nothing to trade.

    Traded are whole extents, so that up to one of them cannot be used when KV blocks need all that they can come to.
    """
    spare = plan.kv_bytes - round_up(least_kv_blocks(plan) * (plan.kv_bytes // plan.kv_blocks), HUGE_PAGE)
    most = min(plan.whole_arena_bytes, plan.arena_bytes + max(0, spare))
    affords_one = plan.arena_bytes - plan.extent_bytes >= plan.least_arena_bytes
    return most if affords_one and most - plan.arena_bytes >= 2 * plan.extent_bytes else plan.arena_bytes


def reserved_arena_bytes(plan: Plan, arena_bytes: int) -> int:
    """Addresses for the arena, of which `arena_bytes` are used at first: where the whole model is in memory and there
    is more, variants may have that."""
    more = plan.memory_bytes - plan.fixed_bytes - arena_bytes
    if more < max(2 * plan.extent_bytes, HUGE_PAGE):
        return arena_bytes
    return min(arena_bytes + more, _MOST_TIMES * round_up(arena_bytes, plan.extent_bytes)) // PAGE * PAGE


class MemoryShares:
    """Who has how much of the bytes that KV blocks and planes have together. For one thread, between steps."""

    def __init__(
        self, plan: Plan, *, planes: PlaneCache, arena_buffer: HostBuffer, kv: KVPool, kv_buffer: HostBuffer
    ) -> None:
        self._planes, self._arena_buffer, self._kv, self._kv_buffer = planes, arena_buffer, kv, kv_buffer
        self._plan = plan
        self._withheld = self._lent = 0
        self._beyond = False
        self._most_arena = most_arena_bytes(plan)
        self.least_blocks = least_kv_blocks(plan)
        # Finer steps would not free an extent.
        self._step = max(1, plan.extent_bytes // kv.block_bytes)
        self.trades = arena_buffer.nbytes >= self._most_arena > plan.arena_bytes
        """Whether there is anything to trade."""

    @property
    def arena_bytes(self) -> int:
        """What experts have now."""
        return self._planes.nbytes

    @property
    def kv_bytes(self) -> int:
        """What KV blocks have now."""
        return self._kv.limit * self._kv.block_bytes

    @property
    def memory_bytes(self) -> int:
        """The number of bytes as it is now."""
        return self._plan.memory_bytes - self._withheld

    @property
    def missing_kv_bytes(self) -> int:
        """What more memory would go to KV blocks first."""
        return self._plan.missing_kv_bytes

    @property
    def lent_bytes(self) -> int:
        """What variants have."""
        return self._lent

    def left_for_planes(self, lent_bytes: int) -> int:
        """What experts can rely on while variants have so much: KV blocks may then need all that they can come to."""
        plan = self._plan
        return min(plan.memory_bytes - self._withheld - plan.fixed_bytes - lent_bytes, self._arena_buffer.nbytes)

    def lend(self, lent_bytes: int) -> None:
        """Take so much from the experts, in all, for whatever else. Also what is given back is theirs, between steps.

        From the first time on experts may have more than the plan gave them, where the memory has more: planes of
        variants are none of the plan's.
        """
        assert self.left_for_planes(lent_bytes) > 0, lent_bytes
        self._lent, self._beyond = lent_bytes, True
        self.refit()

    def refit(self) -> None:
        """Give experts what is theirs now, after the arena has been cut anew, too."""
        before = self._planes.nbytes
        self._planes.resize(self._arena_beside(self._kv.limit))
        if self._planes.nbytes < before:
            self._arena_buffer.release(self._planes.nbytes)

    def part_planes(self, slot_sizes: Sequence[int]) -> None:
        """Have a slot for each plane, of these sizes, from now on; what is in memory has to be read again."""
        self._planes.part(self._plan.extent_bytes, slot_sizes)
        self.refit()

    def resize(self, memory_bytes: int) -> None:
        """Make the number of bytes another one, at most the one that the model was opened with.

        What goes is taken from the experts, and its pages go back to the system. KV blocks stay what they were.

        Raises:
            BudgetError: it is above that, or too little for the KV blocks and two experts.
        """
        plan = self._plan
        # Of the arena whole extents can be used: up to one of them is lost.
        least = plan.fixed_bytes + self._lent + plan.least_arena_bytes + self._planes.extent_bytes
        least = min(least, plan.memory_bytes)
        if not least <= memory_bytes <= plan.memory_bytes:
            raise BudgetError(
                f"The memory cannot be made {format_bytes(memory_bytes)} ({memory_bytes} bytes) while the model is "
                f"open. Expected {least} to {plan.memory_bytes} bytes, which it was opened with; open it anew for more."
            )
        self._withheld = plan.memory_bytes - memory_bytes
        self.refit()

    def give_kv(self, blocks: int) -> None:
        """Let KV have `blocks` blocks, or a few more: those in use are all below. The experts get the rest."""
        if not self.trades:
            return
        kv = self._kv
        limit = min(kv.blocks, round_up(max(blocks, self.least_blocks), self._step))
        arena = self._arena_beside(limit)
        if limit < kv.limit:
            kv.resize(limit)
            self._kv_buffer.release(limit * kv.block_bytes)
            self._planes.resize(arena)
        elif limit > kv.limit:
            self._planes.resize(arena)
            self._arena_buffer.release(self._planes.nbytes)
            kv.resize(limit)

    def _arena_beside(self, kv_blocks: int) -> int:
        """The experts' bytes when so many KV blocks may be used."""
        plan, kv = self._plan, self._kv
        taken = min(round_up(kv_blocks * kv.block_bytes, HUGE_PAGE), plan.kv_bytes)
        most = self._arena_buffer.nbytes
        if not self._beyond:
            most = self._most_arena if self.trades else min(most, round_up(plan.arena_bytes, plan.extent_bytes))
        left = plan.memory_bytes - self._withheld - self._lent - plan.fixed_bytes + plan.kv_bytes
        return min(most, left - taken)
