"""Forward passes of one row that fetch what they lack: slots are lent before, and who has to hear of it hears after.

Shapes: L layers, T rows of the batch, K experts per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moestro import _native
from moestro.memory.lending import Fetched, Fetches, Lending
from moestro.memory.transfer import TransferEngine
from moestro.runtime.batch import PackedBatch
from moestro.spans import Part

if TYPE_CHECKING:
    from moestro.runtime.experts import RoutedExperts


def lend_slots(experts: RoutedExperts, transfers: TransferEngine, address: int) -> None:
    """Have the cache of a model lend slots, at this address, where its experts and its reads are such that it can."""
    if None in experts.known or experts.foresight is None or not transfers.reads_by_queue:
        return
    if Lending.serves(experts.planes, experts.chains):
        counts = [len(one) for one in experts.chains]
        experts.planes.lending = Lending(experts.planes, transfers, counts, address)


class PassFetching:
    """What passes of a model's decoder fetch."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self._limits: tuple[list[int], list[int]] = [], []

    def begins(self, batch: PackedBatch) -> bool:
        """A forward pass begins; whether it fetches what it lacks. Slots are lent then."""
        fetches = self._lend(batch)
        if not fetches:
            self._experts.planes.give_up(0)
        return fetches

    def _lend(self, batch: PackedBatch) -> bool:
        experts, lending = self._experts, self._experts.planes.lending
        foresight, order = experts.foresight, experts.order
        if lending is None or foresight is None or batch.rows > 1 or experts.deltas is not None or not experts.exact:
            return False
        if not foresight.fetches or (order is not None and order.by_time):
            return False
        experts.planes.settle()
        experts.learn()
        asks, self._limits = foresight.reads_ahead, foresight.lend()
        if lending.lend(self._limits, begins=True):
            return True
        foresight.reads_ahead = asks
        return False

    def goes_on(self) -> None:
        """The decoder, which has come back, goes on with the pass."""
        if (lending := self._experts.planes.lending) is not None:
            lending.lend(self._limits, begins=False)

    def take_back(self) -> Fetches:
        """The decoder comes back."""
        lending = self._experts.planes.lending
        return Fetches() if lending is None else lending.take_back()

    def give_up(self) -> None:
        """The pass ends with an error, in the decoder or while what it did is counted."""
        if (lending := self._experts.planes.lending) is not None:
            lending.end()

    def count(self, first: int, index_LTK: np.ndarray, weights_LTK: np.ndarray, fetches: Fetches) -> None:
        """The pass has gone through layers from `first` on, of this routing, and come back with this.

        Raises PlaneReadError, once all is as it should be, when something that was read is damaged.
        """
        experts, foresight, lending = self._experts, self._experts.foresight, self._experts.planes.lending
        assert foresight is not None
        if not fetches.visits and len(index_LTK):
            experts.count_known(first, index_LTK, weights_LTK)
        if lending is None or not (fetches.visits or fetches.fetched):
            return
        experts.spans.begin(Part.POLICY)
        counts_LE = experts.count(first, index_LTK, fetched=fetches.missed)
        routings = experts.routings(first, index_LTK, weights_LTK, counts_LE)
        damage = None
        for number, (visit, routing) in enumerate(zip(fetches.visits, routings, strict=True), start=1):
            after = fetches.visits[number] if number < len(fetches.visits) else None
            demand = fetches.demand(visit.layer)
            late = [one for one in fetches.ahead(visit.layer) if one.kind is _native.FetchKind.LATE]
            foresight.fetched(routing, visit, max([visit.routed, *(one.ended for one in demand + late)]))
            damage = lending.put_down(demand) or damage
            ahead = fetches.ahead(visit.layer + 1)
            if after is not None and not visit.reading:
                foresight.computed(after.routed - visit.routed, reading_s=sum(one.ended - one.begun for one in ahead))
            if visit.candidates:
                foresight.looked(visit, [one.expert for one in ahead])
                damage = lending.put_down(_unmet(ahead) if after is None else ahead) or damage
        end = first + len(index_LTK)  # whose reads have failed, where there are any
        left = [*fetches.demand(end), *(one for one in fetches.fetched if one.layer > end)]
        damage = lending.put_down(_unmet(left)) or damage
        experts.spans.end()
        if damage is not None:
            raise damage


def _unmet(ahead: list[Fetched]) -> list[Fetched]:
    """As their layer was not computed, it did not use them so far."""
    met = (_native.FetchKind.IN_TIME, _native.FetchKind.LATE)
    return [one._replace(kind=_native.FetchKind.AHEAD) if one.kind in met else one for one in ahead]
