"""What a replay judges: a policy and a predictor by name, fitted to some requests of a trace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moestro.errors import TraceError
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KEEP_POLICIES, KeepPolicy, make_keep_policy
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.keeping.value import Value
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import Predictor, make_predictor
from moestro.policy.predictors.net import Nets
from moestro.policy.prefetch import Prefetcher
from moestro.simulate.passes import passes
from moestro.trace.trace import Trace

VALUE = "value"
LEARNED = "learned"


def policy_names() -> list[str]:
    """Of all policies that can be judged."""
    return sorted([*KEEP_POLICIES, VALUE])


@dataclass(frozen=True)
class Contender:
    """`predictor` is None where nothing needs one; `shared` when the policy drives it."""

    shape: Shape
    policy: KeepPolicy
    predictor: Predictor | None
    shared: bool

    def foresight(self, *, prefetch: bool) -> Foresight:
        """What a runtime would be driven by."""
        prefetcher = None
        if prefetch:
            assert self.predictor is not None
            prefetcher = Prefetcher(self.shape, self.predictor)
        own = None if self.shared else self.predictor
        return Foresight(WorthEviction(self.policy, self.shape), prefetcher=prefetcher, own_predictor=own)

    def fit(self, trace: Trace) -> None:
        """Let policy and predictor see the requests of a trace, one after another."""
        told: list[KeepPolicy | Predictor] = [self.policy]
        if self.predictor is not None and not self.shared:
            told.append(self.predictor)
        for one in passes(trace):
            weights_BLK = trace.weights_NLK[one.rows_B] / np.float32(255)
            ids_BLK = trace.experts_NLK[one.rows_B].astype(np.int64)
            for each in told:
                for request in one.begins:
                    each.begin(_OTHERS - request)
            rows = [replace(each, request=_OTHERS - each.request) for each in one.requests]
            for layer in range(trace.layers):
                ids_BK, weights_BK = ids_BLK[:, layer], weights_BLK[:, layer]
                routing = Routing.of(layer, ids_BK, weights_BK, rows, experts=trace.num_experts)
                for each in told:
                    each.observe(routing)
            for each in told:
                for request in one.ends:
                    each.end(_OTHERS - request)


_OTHERS = -1
"""Requests that were fitted to are numbered downwards from here: those that are judged have numbers from 0."""


def needs_nets(policy: str, predictor: str, *, prefetch: bool) -> bool:
    """Whether the nets of the learned predictor have a part in it."""
    return LEARNED in predictor.split("+") and (policy == VALUE or prefetch)


def make_contender(
    policy: str, predictor: str, shape: Shape, *, prefetch: bool, nets: tuple[Nets, Nets] | None
) -> Contender:
    """By names; `nets` (after, ahead) are those of the learned predictor.

    Raises:
        RequestError: there is no such name.
        TraceError: the learned predictor is asked for and there are no nets.
    """
    foreseen = None
    if policy == VALUE or prefetch:
        foreseen = _predictor(predictor, shape, nets)
    if policy == VALUE:
        assert foreseen is not None
        return Contender(shape, Value(shape, predictor=foreseen), foreseen, shared=True)
    return Contender(shape, make_keep_policy(policy, shape), foreseen, shared=False)


def _predictor(name: str, shape: Shape, nets: tuple[Nets, Nets] | None) -> Predictor:
    if LEARNED not in name.split("+"):
        return make_predictor(name, shape)
    if nets is None:
        raise TraceError(
            "The learned predictor needs requests to learn from: give --fit half, or a --store that has been fitted."
        )
    after, ahead = nets
    return make_predictor(name, shape, after=after, ahead=ahead)
