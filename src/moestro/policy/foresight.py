"""What is told of every layer's routing, and says which planes leave and which are read ahead.

The runtime drives it with its clock and disk, the simulator with virtual ones.

Shapes: E experts per layer, U experts that a visit uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.keeping.keeper import used
from moestro.policy.observation import Routing
from moestro.policy.predictors.base import Predictor
from moestro.policy.prefetch import Prefetcher, Slack


@dataclass(slots=True)
class Foreseen:
    """What prefetching did for the experts that layers used, counted by both the runtime and the simulator.

    `needed` were absent when the layer before had asked for its planes; `useful` of these were held, or on their way,
    when their own layer routed, and so had been read ahead, in time or late. `made` counts all that were, used or not.
    """

    needed: int = 0
    made: int = 0
    useful: int = 0

    @property
    def recall(self) -> float:
        """0 where nothing was needed."""
        return self.useful / max(self.needed, 1)

    @property
    def precision(self) -> float:
        """0 where nothing was read ahead."""
        return self.useful / max(self.made, 1)


class Foresight:
    """A policy and, when prefetching, a predictor: `own_predictor` is one that the policy does not drive already."""

    def __init__(
        self,
        eviction: WorthEviction,
        *,
        prefetcher: Prefetcher | None = None,
        own_predictor: Predictor | None = None,
    ) -> None:
        self.eviction = eviction
        self.prefetcher = prefetcher
        self.foreseen = Foreseen()
        # A layer, which of its experts were absent [E], and whether any were proposed.
        self._absent: tuple[int, np.ndarray, bool] | None = None
        self._told = (eviction,) if own_predictor is None else (own_predictor, eviction)

    @property
    def fetches(self) -> bool:
        """Whether passes may fetch without asking for each expert, as far as reading ahead goes."""
        return self.prefetcher is None or self.prefetcher.by_rank

    def begin(self, request: int) -> None:
        """A request's first forward pass is about to run."""
        for one in self._told:
            one.begin(request)

    def end(self, request: int) -> None:
        """Nothing more comes of this request."""
        for one in self._told:
            one.end(request)

    def observe(self, routing: Routing) -> None:
        """A layer has routed: to be told before its planes are asked for."""
        if self.prefetcher is not None:
            self.prefetcher.judge(routing.layer, routing.counts_E)
            self._count(routing)
        for one in self._told:
            one.observe(routing)

    def passed(self, routing: Routing) -> None:
        """A layer has routed, with all that it needs in memory, and nothing is asked of the next one."""
        self.observe(routing)
        if self.prefetcher is not None:
            target = self.prefetcher.target(routing.layer)
            self._absent = target, self.eviction.absent(target), False

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray) -> None:
        """What a gate to come says of the hidden states of `layer`, observed last: see `Gate.lookahead`."""
        if self.prefetcher is not None:
            self.prefetcher.lookahead(layer, ahead, ids_TC)

    def propose(self, layer: int, slack: Slack) -> list[tuple[int, int]]:
        """(layer, expert) worth reading now that the planes which `layer` needs have been asked for."""
        if self.prefetcher is None:
            return []
        target = self.prefetcher.target(layer)
        absent_E = self.eviction.absent(target)
        proposed = self.prefetcher.propose(layer, absent_E, slack)
        self._absent = target, absent_E, bool(proposed)
        return proposed

    def made(self, layer: int, candidates: Sequence[int], experts: Sequence[int], slack: Slack) -> None:
        """The next layer's gate named `candidates`, and of these `experts` were asked for: instead of `propose`."""
        assert self.prefetcher is not None
        target = self.prefetcher.target(layer)
        absent_E = self.eviction.absent(target)
        self.prefetcher.lookahead(layer, 1, np.array([candidates]))
        self.prefetcher.made(layer, absent_E, experts, slack)
        self._absent = target, absent_E, bool(experts)

    def _count(self, routing: Routing) -> None:
        if self._absent is None or self._absent[0] != routing.layer:
            return
        _, absent_E, proposed = self._absent
        used_U = used(routing)
        self.foreseen.needed += int(np.count_nonzero(absent_E[used_U]))
        if proposed:
            made_E = absent_E > self.eviction.absent(routing.layer)
            self.foreseen.made += int(np.count_nonzero(made_E))
            self.foreseen.useful += int(np.count_nonzero(made_E[used_U]))
