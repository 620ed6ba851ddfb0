"""The order in which a layer's experts are read, by name, with costs measured as the model runs.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from moestro.memory.planes import Arrange, Chain, MissingChain
from moestro.memory.transfer import TransferEngine
from moestro.policy.order import ChainLoad, ComputeCosts, make_load_order
from moestro.policy.order.johnson import johnson


class ReadOrder:
    """Asked for each layer by `of`; told of computations by `computing` and `computed`, if it goes `by_time`."""

    def __init__(self, name: str, transfers: TransferEngine) -> None:
        """Raises RequestError for a name that does not exist."""
        self._order, self._transfers, self._costs = make_load_order(name), transfers, ComputeCosts()
        self.by_time = self._order is johnson
        self._began = 0.0

    def of(self, chains: Sequence[Chain], counts_E: np.ndarray, *, rows: int) -> Arrange | None:
        """How to arrange the reads of a step of so many rows that asks for these chains; None: as they are asked for.

        One row wants each of its experts once: then only times tell them apart.
        """
        if rows == 1 and not self.by_time:
            return None

        def arrange(missing: Sequence[MissingChain]) -> list[int]:
            # By expert, so that what is equal is read in the order in which it lies on disk.
            positions = sorted(range(len(missing)), key=lambda position: chains[missing[position].index])
            per_byte_s = self._seconds_per_byte()
            loads = [
                self._load(chains[missing[position].index], missing[position], counts_E, per_byte_s)
                for position in positions
            ]
            return [positions[place] for place in self._order(loads)]

        return arrange

    def computing(self) -> None:
        """Experts that have arrived are about to be computed."""
        self._began = time.perf_counter()

    def computed(self, experts: Sequence[int], counts_E: np.ndarray) -> None:
        """These experts have been."""
        seconds = time.perf_counter() - self._began
        self._costs.computed(len(experts), int(counts_E[list(experts)].sum()), seconds)

    def _load(self, chain: Chain, missing: MissingChain, counts_E: np.ndarray, per_byte_s: float) -> ChainLoad:
        expert = chain[0][1]
        tokens = int(counts_E[expert])
        return ChainLoad(expert, len(chain), tokens, missing.nbytes * per_byte_s, self._costs.seconds(tokens))

    def _seconds_per_byte(self) -> float:
        if not self.by_time:
            return 0.0
        stats = self._transfers.stats
        return stats.busy_seconds / stats.bytes_read if stats.bytes_read else 0.0
