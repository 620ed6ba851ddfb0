"""Experts quantised from their weights alone.

Shapes: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from moestro.quant import LEVELS, make_encoding
from moestro.quant.encoding import Encoding
from moestro.store.calibration_facts import rounded
from moestro.store.expert_work import ExpertWork, Findings, WithoutText
from moestro.store.pack_plan import PackPlan
from moestro.store.workers import in_order
from moestro.store.writer import EncodedExpert

_Done = tuple[int, int, dict[str, torch.Tensor], EncodedExpert]


class DataFree(WithoutText):
    """An `ExpertEncoder` that looks at no text."""

    def __init__(self, *, warnings: tuple[str, ...] = ()) -> None:
        self._warnings = warnings

    def dense_units(self, plan: PackPlan) -> frozenset[int]:
        """None."""
        del plan
        return frozenset()

    def run(self, work: ExpertWork) -> Findings:
        """Write every expert that is missing."""
        for layer, expert, weights, encoded in in_order(self._jobs(work)):
            work.write(layer, expert, weights, encoded)
        return Findings(warnings=self._warnings)

    def _jobs(self, work: ExpertWork) -> Iterator[Callable[[], _Done]]:
        options = work.plan.options
        encoding = make_encoding(options.encoding)
        for layer, entry in enumerate(work.plan.layers):
            for expert in range(entry.experts):
                if work.errors(layer, expert) is None:
                    weights = work.weights(layer, expert)
                    yield partial(_encode_one, layer, expert, weights, encoding, options.promised_levels)


def _encode_one(
    layer: int, expert: int, weights: dict[str, torch.Tensor], encoding: Encoding, levels: tuple[int, ...]
) -> _Done:
    return layer, expert, weights, encode_alone(encoding, weights, levels)


def encode_alone(encoding: Encoding, weights: Mapping[str, torch.Tensor], levels: tuple[int, ...]) -> EncodedExpert:
    """Quantise an expert's matrices. The error of a level is the sum of their relative squared errors: to first order
    that of the output, if inputs were alike in all directions."""
    regions = {name: dict(encoding.encode(value, levels=levels)) for name, value in weights.items() if value.ndim == 2}
    errors = [0.0] * len(levels)
    for name, found in regions.items():
        wanted_NK = weights[name]
        for index, level in enumerate(levels):
            errors[index] += relative_error(wanted_NK, decoded(encoding, found, wanted_NK, level))
    return EncodedExpert(regions, tuple(rounded(error) for error in errors))


def decoded(encoding: Encoding, regions: Mapping[int, torch.Tensor], like_NK: torch.Tensor, level: int) -> torch.Tensor:
    """A matrix [N, K] at a level, from the regions of its chain."""
    chain: Sequence[torch.Tensor] = [regions[bits] for bits in LEVELS if bits <= level]
    rows, columns = like_NK.shape
    return encoding.decode(chain, rows, columns, level)


def relative_error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Squared error over squared size, 0 where there is no error."""
    error = float((wanted - found).square_().sum(dtype=torch.float64))
    size = float(wanted.square().sum(dtype=torch.float64))
    return 0.0 if error == 0.0 else error / max(size, error * 1e-6)
