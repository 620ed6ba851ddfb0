"""Nested and published encodings: errors by level, chains, and weights that are hard to code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.quant import ENCODINGS, LEVELS, make_encoding

# Relative squared errors of Gaussian weights that each level may have without data, with some room.
MOST_ERROR = {
    "nested": {2: 0.17, 3: 0.045, 4: 0.011, 8: 1.5e-4},
    "signs": {2: 0.16, 3: 0.06, 4: 0.03, 8: 2e-3},
}


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def decoded(name: str, weights: torch.Tensor, level: int, **options: object) -> torch.Tensor:
    encoding = make_encoding(name)
    regions = encoding.encode(weights, levels=LEVELS, **options)  # type: ignore[arg-type]
    return encoding.decode([regions[each] for each in LEVELS if each <= level], *weights.shape, level)


def relative_error(values: torch.Tensor, weights: torch.Tensor) -> float:
    return float((values - weights).square().sum() / weights.square().sum())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_errors_of_gaussian_weights(name: str, level: int) -> None:
    weights = gaussian(128, 512)
    assert relative_error(decoded(name, weights, level), weights) < MOST_ERROR[name][level]


@pytest.mark.parametrize("name", ENCODINGS)
@given(rows=st.integers(1, 50), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_planes_are_as_long_as_promised_and_every_level_is_better(
    name: str, rows: int, columns: int, seed: int
) -> None:
    weights = gaussian(rows, columns, seed)
    encoding = make_encoding(name)
    regions = encoding.encode(weights, levels=LEVELS)
    assert {level: len(region) for level, region in regions.items()} == {
        level: encoding.plane_bytes(rows, columns, level) for level in LEVELS
    }
    errors = [relative_error(decoded(name, weights, level), weights) for level in LEVELS]
    assert errors[0] < 0.5
    assert errors[-1] <= errors[0] / 10 or errors[0] < 1e-6


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("levels", [(2,), (2, 4), (4,), (3, 8)])
def test_a_chain_ends_with_its_highest_level(name: str, levels: tuple[int, ...]) -> None:
    regions = make_encoding(name).encode(gaussian(16, 64), levels=levels)
    assert tuple(regions) == LEVELS[: LEVELS.index(max(levels)) + 1]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("level", LEVELS)
def test_zeros_and_constant_groups_are_exact(name: str, level: int) -> None:
    weights = torch.zeros(20, 256)
    weights[3, :128] = 0.75
    weights[4, 128:] = -2.0
    assert torch.equal(decoded(name, weights, level), weights)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e-4, 1e4, 1e12, 1e30])
def test_the_size_of_weights_does_not_matter(name: str, factor: float) -> None:
    weights = gaussian(32, 128) * factor
    values = decoded(name, weights.clone(), 4)
    assert torch.isfinite(values).all()
    assert relative_error(values / factor, weights / factor) < MOST_ERROR[name][4] * 1.5


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_of_very_different_size_keep_their_precision(name: str) -> None:
    weights = gaussian(32, 128)
    weights[16:] *= 1e-4
    values = decoded(name, weights, 4)
    assert relative_error(values[16:], weights[16:]) < MOST_ERROR[name][4] * 2


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("level", [2, 4])
def test_calibration_lowers_the_error_of_outputs(name: str, level: int) -> None:
    weights = gaussian(64, 256)
    mixing = gaussian(256, 256, seed=1) * torch.linspace(0.05, 2, 256)
    inputs = gaussian(2000, 256, seed=2) @ mixing
    unseen = gaussian(500, 256, seed=3) @ mixing
    truth = unseen @ weights.T
    free = relative_error(unseen @ decoded(name, weights, level).T, truth)
    calibrated = decoded(name, weights, level, hessian_KK=inputs.T @ inputs)
    assert relative_error(unseen @ calibrated.T, truth) < 0.9 * free


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_empty_hessian_is_none(name: str) -> None:
    weights = gaussian(16, 64)
    assert torch.equal(decoded(name, weights, 4, hessian_KK=torch.zeros(64, 64)), decoded(name, weights, 4))


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_is_a_function_of_its_input(name: str) -> None:
    weights, inputs = gaussian(40, 160), gaussian(300, 160, seed=5)
    first, second = (
        make_encoding(name).encode(weights.clone(), levels=LEVELS, hessian_KK=inputs.T @ inputs) for _ in range(2)
    )
    assert all(torch.equal(first[level], second[level]) for level in LEVELS)


def test_unknown_encodings_are_named() -> None:
    with pytest.raises(ValueError, match=r"'huffman'.*nested, signs"):
        make_encoding("huffman")
