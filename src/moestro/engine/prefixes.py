"""KV blocks by what they hold, so that what was computed for one request serves others that begin alike.

A full block holds the rows of 16 tokens that follow certain others, computed by a certain variant of the model at a
certain quality. Its name is the block before it, these two and those tokens: requests that begin with the same tokens
find the same chain of blocks, and no two different ones can be taken for each other. An exact request never finds rows
that are not exact. (A pool belongs to a model that is open at one level.) Blocks that are not full belong to one
request alone.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from moestro.engine.sequence import Sequence
from moestro.runtime.kv import BLOCK_ROWS, KVPool, blocks_for
from moestro.runtime.shares import MemoryShares

_WINDOW = 16
"""So many requests end before memory that they did not need is given away."""

_Name = tuple[int, int, float, bytes]


@dataclass(eq=False)
class NamedBlock:
    """A full block: its place in the pool, and how many requests use it."""

    serial: int
    name: _Name
    block: int
    users: int = 0


class Prefixes:
    """Gives KV blocks to requests, and keeps full ones that nobody uses until their room is needed.

    Those used least recently go first, of a chain its end. With `keep` false nothing is kept or shared.
    """

    def __init__(self, kv: KVPool, *, keep: bool, shares: MemoryShares | None = None) -> None:
        self._kv, self._keep, self._shares = kv, keep, shares
        self._named: dict[_Name, NamedBlock] = {}
        self._idle: OrderedDict[int, NamedBlock] = OrderedDict()
        self._serials = count(1)
        self._ends = 0
        self._peaks = [0, 0]  # blocks that requests used at once, in this window and the one before it
        self._fit_need()

    @property
    def kept(self) -> int:
        """Blocks that nobody uses, kept because they may be used again."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that requests use."""
        return self._kv.limit - self._kv.free_blocks - len(self._idle)

    def start(self, sequence: Sequence) -> bool:
        """Give a request all blocks that it can come to need, those that hold its first tokens already among them.

        False, and nothing given, where there is no room.
        """
        chain = self._known(sequence)
        needed = blocks_for(sequence.most_rows) - len(chain)
        lacking = needed - self._kv.free_blocks - len(self._idle) + sum(not one.users for one in chain)
        if lacking > 0:
            if self._shares is None or not self._shares.trades or self._kv.limit + lacking > self._kv.blocks:
                return False
            self._shares.give_kv(self._kv.limit + lacking)
        for one in chain:
            self._use(one)
        while self._kv.free_blocks < needed:
            _, oldest = self._idle.popitem(last=False)
            self._drop(oldest)
        sequence.chain = chain
        sequence.blocks = [one.block for one in chain] + self._kv.allocate(needed)
        sequence.cached = len(chain) * BLOCK_ROWS
        self._peaks[0] = max(self._peaks[0], self.used)
        return True

    def written(self, sequence: Sequence) -> None:
        """More of a request's rows have been computed: its full blocks get names, from now on others may use them."""
        if not self._keep:
            return
        for place in range(len(sequence.chain), sequence.cached // BLOCK_ROWS):
            name = self._name(sequence, place, sequence.chain[-1].serial if sequence.chain else 0)
            known = self._named.get(name)
            if known is None:
                known = NamedBlock(next(self._serials), name, sequence.blocks[place])
                self._named[name] = known
            else:
                # Somebody was faster: two blocks with the same rows are one too many.
                self._kv.release([sequence.blocks[place]])
                sequence.blocks[place] = known.block
            self._use(known)
            sequence.chain.append(known)

    def end(self, sequence: Sequence) -> None:
        """Take a request's blocks back."""
        self._kv.release(sequence.blocks[len(sequence.chain) :])
        for one in reversed(sequence.chain):
            one.users -= 1
            if not one.users:
                self._idle[one.serial] = one
        sequence.blocks, sequence.chain, sequence.cached = [], [], 0
        self._ends += 1
        if self._ends % _WINDOW == 0:
            self._fit_need()
            self._peaks = [self.used, self._peaks[0]]

    def forget(self) -> None:
        """Keep nothing of what nobody uses."""
        for one in self._idle.values():
            self._drop(one)
        self._idle.clear()
        self._peaks = [self.used, 0]
        self._fit_need()

    def _fit_need(self) -> None:
        """Give experts what requests have not needed of late; blocks that are kept there go."""
        if self._shares is None or not self._shares.trades:
            return
        needed = max(*self._peaks, self._shares.least_blocks)
        if 4 * needed > 3 * self._kv.limit:
            return
        for one in tuple(self._idle.values()):
            if one.block >= needed:
                del self._idle[one.serial]
                self._drop(one)
        self._shares.give_kv(max(needed, self._kv.used_until))

    def is_coming(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a request that runs is computing a block that this one could begin with: waiting saves the work."""
        if not self._keep:
            return False
        known, usable = len(self._known(sequence)), _usable_blocks(sequence)
        return any(
            other.budget == sequence.budget
            and other.variant_serial == sequence.variant_serial
            and known < min(usable, len(other.prompt_ids) // BLOCK_ROWS)
            and other.tokens(0, (known + 1) * BLOCK_ROWS) == sequence.tokens(0, (known + 1) * BLOCK_ROWS)
            for other in running
        )

    def _known(self, sequence: Sequence) -> list[NamedBlock]:
        """The blocks that hold a request's first tokens already; at least one token is left to compute."""
        chain: list[NamedBlock] = []
        for place in range(_usable_blocks(sequence) if self._keep else 0):
            found = self._named.get(self._name(sequence, place, chain[-1].serial if chain else 0))
            if found is None:
                break
            chain.append(found)
        return chain

    def _name(self, sequence: Sequence, place: int, before: int) -> _Name:
        tokens = array("I", sequence.tokens(place * BLOCK_ROWS, (place + 1) * BLOCK_ROWS))
        return before, sequence.variant_serial, sequence.budget, tokens.tobytes()

    def _use(self, one: NamedBlock) -> None:
        if not one.users:
            self._idle.pop(one.serial, None)
        one.users += 1

    def _drop(self, one: NamedBlock) -> None:
        del self._named[one.name]
        self._kv.release([one.block])


def _usable_blocks(sequence: Sequence) -> int:
    return (sequence.known_tokens - 1) // BLOCK_ROWS
