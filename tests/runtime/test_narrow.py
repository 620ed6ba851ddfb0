"""Narrow outputs: elementwise functions give an element the same bits wherever it lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moestro.runtime.narrow import NarrowOutput, guard

FUNCTIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.sigmoid,
    torch.exp,
    torch.Tensor.sigmoid,
    torch.Tensor.tanh,
    F.sigmoid,
    F.silu,
    F.softplus,
    F.gelu,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("columns", [1, 8, 40])
def test_rows_alone_and_together_have_the_same_bits(
    function: Callable[[torch.Tensor], torch.Tensor], columns: int
) -> None:
    rows = torch.randn(67, columns, generator=torch.Generator().manual_seed(2)) * 4
    together = function(guard(rows))
    alone = torch.cat([function(guard(row[None])) for row in rows])
    assert torch.equal(together, alone)
    assert type(together) is torch.Tensor
    torch.testing.assert_close(together, function(rows))


def test_the_problem_exists() -> None:
    """Without care the bits differ; should torch ever mend that, this room can go."""
    rows = torch.randn(67, 8, generator=torch.Generator().manual_seed(2)) * 4
    alone = torch.cat([torch.sigmoid(row[:1]) for row in rows.view(-1, 1)])
    assert not torch.equal(torch.sigmoid(rows).view(-1), alone)


def test_casts_and_views_stay_narrow_and_arithmetic_does_not() -> None:
    narrow = guard(torch.randn(3, 8))
    assert type(narrow.float().view(-1).unsqueeze(0)) is NarrowOutput
    assert type(narrow + 1.0) is torch.Tensor
    assert type(narrow.softmax(-1)) is torch.Tensor
    assert type(guard(torch.randn(3, 64))) is torch.Tensor
