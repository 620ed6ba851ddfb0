"""Lets a policy see the requests of a trace before it is judged on others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moestro.policy.choice import Choice
from moestro.policy.keeping import KeepPolicy
from moestro.policy.observation import Routing
from moestro.policy.predictors import Predictor
from moestro.simulate.passes import passes
from moestro.trace.trace import Trace

_OTHERS = -1
"""Requests that were fitted to are numbered downwards from here: those that are judged have numbers from 0."""


def fit(choice: Choice, trace: Trace) -> None:
    """Show the policy, and the predictor if it is driven apart, all requests one after another."""
    told: list[KeepPolicy | Predictor] = [choice.policy]
    if choice.predictor is not None and not choice.shared:
        told.append(choice.predictor)
    for one in passes(trace):
        weights_BLK = trace.weights_NLK[one.rows_B] / np.float32(255)
        ids_BLK = trace.experts_NLK[one.rows_B].astype(np.int64)
        rows = [replace(each, request=_OTHERS - each.request) for each in one.requests]
        for each in told:
            for request in one.begins:
                each.begin(_OTHERS - request)
        for layer in range(trace.layers):
            ids_BK, weights_BK = ids_BLK[:, layer], weights_BLK[:, layer]
            routing = Routing.of(layer, ids_BK, weights_BK, rows, experts=trace.num_experts)
            for each in told:
                each.observe(routing)
        for each in told:
            for request in one.ends:
                each.end(_OTHERS - request)
