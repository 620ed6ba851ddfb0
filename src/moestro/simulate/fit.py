"""Lets a policy see the requests of a trace before it is judged on others."""

from __future__ import annotations

from dataclasses import replace

from moestro.policy.choice import Choice
from moestro.policy.keeping import KeepPolicy
from moestro.policy.predictors import LooksAhead, Predictor
from moestro.simulate.passes import passes
from moestro.simulate.routings import routings, tell_gates
from moestro.trace.trace import Trace

_OTHERS = -1
"""Requests that were fitted to are numbered downwards from here: those that are judged have numbers from 0."""


def fit(choice: Choice, trace: Trace, *, gates: LooksAhead | None = None) -> None:
    """Show the policy, and the predictor if it is driven apart, all requests one after another."""
    told: list[KeepPolicy | Predictor] = [choice.policy]
    if choice.predictor is not None and not choice.shared:
        told.append(choice.predictor)
    for one in passes(trace):
        one = replace(one, requests=tuple(replace(each, request=_OTHERS - each.request) for each in one.requests))
        for each in told:
            for request in one.begins:
                each.begin(_OTHERS - request)
        for routing in routings(trace, one):
            for each in told:
                each.observe(routing)
            tell_gates(gates, trace, one, routing.layer)
        for each in told:
            for request in one.ends:
                each.end(_OTHERS - request)
