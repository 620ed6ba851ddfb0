"""What a matrix aims at when its inputs are not the original ones."""

from __future__ import annotations

import torch

from moestro.calibration.expert import aim_of
from moestro.quant import make_encoding


def _inputs(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Original inputs, those that are found instead (smaller, and some mixed into others), and rows' weights."""
    generator = torch.Generator().manual_seed(rows)
    wanted = torch.randn((rows, columns), generator=generator)
    noise = 0.1 * torch.randn((rows, columns), generator=generator)
    return wanted, 0.9 * wanted + 0.2 * wanted.roll(1, 1) + noise, torch.rand(rows, generator=generator)


def _error(wanted: torch.Tensor, found: torch.Tensor, weights: torch.Tensor) -> float:
    return float(((wanted - found) * weights.unsqueeze(1)).square().sum())


def test_outputs_come_nearer_to_the_original_ones() -> None:
    wanted, found, weights = _inputs(2000, 64)
    matrix = torch.randn((32, 64), generator=torch.Generator().manual_seed(0))
    aim = aim_of(matrix, wanted, found, weights)
    before, after = (_error(wanted @ matrix.T, found @ one.T, weights) for one in (matrix, aim))
    assert after < 0.3 * before


def test_the_same_inputs_change_nothing() -> None:
    wanted, _, weights = _inputs(300, 32)
    matrix = torch.randn((8, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aim_of(matrix, wanted, wanted, weights), matrix)
    nothing = torch.zeros(300, 32)
    assert torch.equal(aim_of(matrix, wanted, nothing, weights), matrix)


def test_few_rows_are_hardly_believed() -> None:
    matrix = torch.randn((32, 64), generator=torch.Generator().manual_seed(0))
    changes = [float((aim_of(matrix, *_inputs(rows, 64)) - matrix).norm()) for rows in (4, 2000)]
    assert changes[0] < 0.2 * changes[1]


def test_levels_come_near_to_what_they_aim_at() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn((32, 64), generator=generator)
    inputs = torch.randn((500, 64), generator=generator)
    for name in ("nested", "signs"):
        encoding = make_encoding(name)
        aims = dict.fromkeys((2, 3, 4), matrix + torch.randn((32, 64), generator=generator) * 0.3)
        found = []
        for its_aims in (None, aims):
            regions = encoding.encode(matrix, levels=(2, 3, 4), hessian_KK=inputs.T @ inputs, aims=its_aims)
            found.append({n: encoding.decode([regions[b] for b in aims if b <= n], 32, 64, n) for n in aims})
        for level, aim in aims.items():
            plain, aimed = (float((inputs @ (aim - one[level]).T).square().sum()) for one in found)
            assert aimed < plain, (name, level)
