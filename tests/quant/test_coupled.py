"""Codes whose rows make up for each other's errors."""

from __future__ import annotations

import pytest
import torch

from moestro.quant.codes import LEVELS
from moestro.quant.encoding import PRIORITIES
from moestro.quant.nested import NestedEncoding


def gram_of(size: int, *, seed: int, alike: float = 0.0) -> torch.Tensor:
    """A mean of x x^T; the values of a row have as much in common as `alike` says."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((4 * size, size), generator=generator) @ torch.randn((size, size), generator=generator)
    rows = rows / size**0.5 + alike * torch.randn((4 * size, 1), generator=generator)
    return rows.T @ rows / len(rows)


def costs(metric: torch.Tensor | None, *, judge: torch.Tensor, hessian: torch.Tensor) -> list[float]:
    """tr(F E H E^T) at each level of a matrix that is rounded with `metric`, judged by another."""
    matrix = torch.randn((len(judge), len(hessian)), generator=torch.Generator().manual_seed(1))
    encoding = NestedEncoding()
    regions = encoding.encode(matrix, levels=LEVELS, hessian_KK=hessian, metric_NN=metric)
    found = []
    for level in LEVELS:
        planes = [regions[bits] for bits in LEVELS if bits <= level]
        error = encoding.decode(planes, *matrix.shape, level) - matrix
        found.append(float(((judge @ error @ hessian) * error).sum()))
    return found


@pytest.mark.parametrize("alike", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("rows", [64, 40, 200])
def test_what_errors_cost_together_falls_at_each_level(alike: float, rows: int) -> None:
    metric, hessian = gram_of(rows, seed=2, alike=alike), gram_of(96, seed=3)
    alone, coupled = (costs(one, judge=metric, hessian=hessian) for one in (None, metric))
    for level, before, after in zip(LEVELS[:3], alone, coupled, strict=False):
        assert after < before, level
    weighted = [
        sum(PRIORITIES[level] * cost for level, cost in zip(LEVELS[:3], one, strict=False)) for one in (alone, coupled)
    ]
    assert weighted[1] < 0.95 * weighted[0]


def test_rows_that_are_all_the_same_to_what_follows_do_not_swing() -> None:
    metric, hessian = torch.ones((32, 32)), gram_of(64, seed=3)
    alone, coupled = (costs(one, judge=torch.eye(32), hessian=hessian) for one in (None, metric))
    assert coupled[2] < 4 * alone[2]


def test_an_empty_metric_changes_nothing() -> None:
    hessian = gram_of(64, seed=3)
    empty, none = (costs(one, judge=torch.eye(16), hessian=hessian) for one in (torch.zeros((16, 16)), None))
    assert empty == none
