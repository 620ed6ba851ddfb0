"""The heat map of experts."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from moestro.cli.picture import busiest_share, draw_experts


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (8, 32), (94, 128), (58, 256)])
def test_a_picture_has_a_size_to_look_at(layers: int, experts: int, tmp_path: Path) -> None:
    counts_LE = np.random.default_rng(0).integers(0, 50, (layers, experts))
    draw_experts(counts_LE, tmp_path / "experts.png", model="some model", tokens=100)
    content = (tmp_path / "experts.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert 800 <= width <= 4000
    assert 400 <= height <= 3000


def test_a_model_that_routed_nothing_can_be_drawn(tmp_path: Path) -> None:
    draw_experts(np.zeros((2, 4), dtype=np.int64), tmp_path / "experts.png", model="idle", tokens=0)
    assert (tmp_path / "experts.png").stat().st_size > 0


def test_share_of_the_busiest_quarter() -> None:
    assert busiest_share(np.array([[0, 9, 1, 0], [5, 5, 5, 5]])) == pytest.approx(14 / 30)
    assert busiest_share(np.zeros((1, 8), dtype=np.int64)) == 0.0
