"""What was kept of a layer is given back bit for bit, or not at all."""

from __future__ import annotations

from pathlib import Path

import torch

from moestro.calibration.scratch import LayerScratch

SHAPES = [torch.Size((3, 5)), torch.Size((1, 5)), torch.Size((7, 5))]


def _outputs() -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]


def test_round_trip(tmp_path: Path) -> None:
    scratch = LayerScratch(tmp_path / "scratch", "this")
    assert scratch.load(2, SHAPES) is None
    scratch.save(2, _outputs())
    found = LayerScratch(tmp_path / "scratch", "this").load(2, SHAPES)
    assert found is not None
    assert all(torch.equal(one, other) for one, other in zip(found, _outputs(), strict=True))


def test_of_another_layer_or_pack_is_nothing(tmp_path: Path) -> None:
    scratch = LayerScratch(tmp_path / "scratch", "this")
    scratch.save(2, _outputs())
    assert scratch.load(1, SHAPES) is None
    assert LayerScratch(tmp_path / "scratch", "that").load(2, SHAPES) is None
    assert scratch.load(2, SHAPES[:2]) is None
    assert scratch.load(2, [*SHAPES, torch.Size((1, 5))]) is None
    (file,) = (tmp_path / "scratch").iterdir()
    file.rename(file.with_name("layer-00003.outputs"))
    assert scratch.load(3, SHAPES) is None


def test_damage_is_nothing(tmp_path: Path) -> None:
    scratch = LayerScratch(tmp_path / "scratch", "this")
    scratch.save(0, _outputs())
    (file,) = (tmp_path / "scratch").iterdir()
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert scratch.load(0, SHAPES) is None
    for size in (0, 4, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert scratch.load(0, SHAPES) is None
    file.write_bytes(whole + b"\0")
    assert scratch.load(0, SHAPES) is None
    file.write_bytes(whole)
    assert scratch.load(0, SHAPES) is not None
