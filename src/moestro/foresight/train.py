"""Trains the nets of the learned predictor on recorded traces: minutes on a processor, layer after layer.

Shapes: N visits (rows of the trace), L MoE layers, E experts, F own features, D inputs of a net, W width, H horizons,
B rows of a batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from moestro.errors import TraceError
from moestro.policy.observation import Shape
from moestro.policy.predictors.history import NEIGHBOURS, OWN, dense_rows, histories, input_size
from moestro.policy.predictors.net import HORIZONS, Nets
from moestro.trace.trace import Trace

LEAST_ROWS = 256
_MOST_BYTES = 1 << 30
_LEAST_BATCH, _LEAST_STEPS = 64, 32
"""Short traces are gone through in smaller batches, so that an epoch has some steps."""

_Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Measured on real routing: more epochs and a width of 128 gain a point of the gap to Belady each."""

    epochs: int = 8
    width: int = 64
    ahead_width: int = 128
    rate: float = 4e-3
    batch: int = 1024
    seed: int = 0


def train(
    trace: Trace, options: TrainingOptions | None = None, *, progress: Callable[[int], None] = lambda _layers: None
) -> tuple[Nets, Nets]:
    """(nets for after a layer has routed, nets for the layer ahead); deterministic on one machine.

    Raises:
        TraceError: the trace has too few rows to learn from.
    """
    options = options or TrainingOptions()
    rows, layers, _ = trace.experts_NLK.shape
    if rows < LEAST_ROWS:
        raise TraceError(f"The trace has {rows} rows, expected at least {LEAST_ROWS} to learn from: record more.")
    routing = _Routing(trace)
    after, ahead = [], []
    with _one_thread_each(), ThreadPoolExecutor(_workers(trace)) as pool:
        for pair in pool.map(lambda layer: _layer(routing, layer, options), range(layers)):
            after.append(pair[0])
            ahead.append(pair[1])
            progress(len(after))
    return _stacked(after), _stacked(ahead)


def _layer(routing: _Routing, layer: int, options: TrainingOptions) -> tuple[_Weights, _Weights]:
    inputs_ND, uses_NE, seed = routing.inputs(layer), routing.uses(layer), options.seed + layer
    within_NHE = torch.from_numpy(_uses_within(uses_NE, HORIZONS))
    after = _fit(inputs_ND, within_NHE, options, width=options.width, seed=seed)
    before_ND, next_N1E = routing.inputs_before(inputs_ND), torch.from_numpy(uses_NE).unsqueeze(1)
    return after, _fit(before_ND, next_N1E, options, width=options.ahead_width, seed=seed)


def _workers(trace: Trace) -> int:
    """One for each processor, as far as what a layer takes allows."""
    layer_bytes = 16 * trace.rows * input_size(trace.num_experts)
    return max(1, min(os.cpu_count() or 1, _MOST_BYTES // layer_bytes))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Products this small are slower on several threads, on a busy machine ten times: layers are shared out instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nets_bytes(shape: Shape, options: TrainingOptions | None = None) -> int:
    """Bytes of all weights that `train` would make for a model of this shape."""
    options, experts = options or TrainingOptions(), shape.experts
    roles = ((options.width, len(HORIZONS)), (options.ahead_width, 1))
    weights = sum(
        (input_size(experts) + 1) * width + (width + OWN + 1) * horizons * experts for width, horizons in roles
    )
    return 4 * shape.layers * weights


class _Routing:
    """Dense views of a trace, a layer at a time. All rows are one stream: a request begins where the last one ended."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._layers = trace.experts_NLK.shape[1]

    def uses(self, layer: int) -> np.ndarray:
        return self._dense(layer)[0]

    def inputs(self, layer: int) -> torch.Tensor:
        """[N, D] as `History.inputs` has them after each row's visit of the layer."""
        own_NFE = self._own(layer)
        latest = [self._latest(layer, layer + offset) for offset in NEIGHBOURS]
        return torch.from_numpy(np.concatenate([own_NFE.reshape(len(own_NFE), -1), *latest], axis=1))

    def inputs_before(self, after_ND: torch.Tensor) -> torch.Tensor:
        """The same before the visit: the own history is a row older, that of its neighbours is not."""
        experts = self._trace.num_experts
        before_ND = after_ND.clone()
        before_ND[0, : OWN * experts] = 0
        before_ND[1:, : OWN * experts] = after_ND[:-1, : OWN * experts]
        return before_ND

    def _own(self, layer: int) -> np.ndarray:
        uses_NE, weights_NE = self._dense(layer)
        return histories(uses_NE, weights_NE, np.zeros((OWN, uses_NE.shape[1]), dtype=np.float32))

    def _latest(self, layer: int, other: int) -> np.ndarray:
        """Weights of the other layer's latest visit when `layer` routes: of this row, or of the row before."""
        weights_NE = self._dense(other % self._layers)[1]
        if other % self._layers < layer:
            return weights_NE
        return np.concatenate((np.zeros_like(weights_NE[:1]), weights_NE[:-1]))

    def _dense(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        trace = self._trace
        return dense_rows(trace.experts_NLK[:, layer], trace.weights_NLK[:, layer], trace.num_experts)


def _uses_within(uses_NE: np.ndarray, horizons: tuple[int, ...]) -> np.ndarray:
    """[N, H, E], 0 or 1: whether one of the next visits, as many as the horizon says, uses the expert."""
    rows = np.arange(len(uses_NE))[:, None]
    next_NE = np.where(uses_NE > 0, rows, len(uses_NE) + max(horizons))
    next_NE = np.minimum.accumulate(next_NE[::-1], axis=0)[::-1]
    after_NE = np.concatenate((next_NE[1:], np.full_like(next_NE[:1], len(uses_NE) + max(horizons))))
    return np.stack([after_NE - rows <= horizon for horizon in horizons], axis=1).astype(np.float32)


def _fit(
    inputs_ND: torch.Tensor, wanted_NHE: torch.Tensor, options: TrainingOptions, *, width: int, seed: int
) -> _Weights:
    """One layer's weights, by AdamW on the cross entropy of each expert and horizon."""
    rows, inputs = inputs_ND.shape
    _, horizons, experts = wanted_NHE.shape
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "inner_DW": torch.randn(inputs, width, generator=generator) / math.sqrt(inputs),
        "inner_bias_W": torch.zeros(width),
        "outer_WHE": torch.zeros(width, horizons, experts),
        "own_HFE": torch.zeros(horizons, OWN, experts),
        "bias_HE": torch.full((horizons, experts), -1.0),
    }
    assert inputs == input_size(experts)
    for one in weights.values():
        one.requires_grad_(True)
    batch = min(options.batch, max(_LEAST_BATCH, rows // _LEAST_STEPS))
    steps = options.epochs * (rows // batch)
    optimizer = torch.optim.AdamW(weights.values(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, pct_start=0.1)
    for _ in range(options.epochs):
        order_N = torch.randperm(rows, generator=generator)
        for step in range(rows // batch):
            picked_B = order_N[step * batch : (step + 1) * batch].sort().values
            logits_BHE = _logits(weights, inputs_ND[picked_B])
            loss = functional.binary_cross_entropy_with_logits(logits_BHE, wanted_NHE[picked_B])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return {name: one.detach() for name, one in weights.items()}


def _logits(weights: _Weights, inputs_BD: torch.Tensor) -> torch.Tensor:
    horizons, own, experts = weights["own_HFE"].shape
    inner_BW = functional.relu(torch.addmm(weights["inner_bias_W"], inputs_BD, weights["inner_DW"]))
    logits_BHE = (inner_BW @ weights["outer_WHE"].flatten(1)).view(-1, horizons, experts)
    own_BFE = inputs_BD[:, : own * experts].view(-1, own, experts)
    own_BHE = torch.einsum("bfe,hfe->bhe", own_BFE, weights["own_HFE"])
    return logits_BHE + own_BHE + weights["bias_HE"]


def _stacked(layers: list[_Weights]) -> Nets:
    def stack(name: str) -> np.ndarray:
        return torch.stack([layer[name] for layer in layers]).numpy()

    return Nets(stack("inner_DW"), stack("inner_bias_W"), stack("outer_WHE"), stack("own_HFE"), stack("bias_HE"))
