"""What is told of every layer's routing, and says which planes leave and which are read ahead.

The runtime drives it with its clock and disk, the simulator with virtual ones.
"""

from __future__ import annotations

from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.observation import Routing
from moestro.policy.predictors.base import Predictor
from moestro.policy.prefetch import Prefetcher, Slack


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
        self._told = (eviction,) if own_predictor is None else (own_predictor, eviction)

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
        for one in self._told:
            one.observe(routing)

    def propose(self, layer: int, slack: Slack) -> list[tuple[int, int]]:
        """(layer, expert) worth reading now that the planes which `layer` needs have been asked for."""
        return [] if self.prefetcher is None else self.prefetcher.propose(layer, self.eviction.absent, slack)
