"""The predictor that calibrated packing leaves in a store: there where it pays, the same whatever happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.checkpoints import save_with_tokenizer, write_text
from moestro.calibration import pack
from moestro.config import PackOptions
from moestro.foresight import NETS_FILE, load_nets, net_file
from moestro.policy.observation import Shape


def test_a_store_learns_its_routing_where_that_is_little_beside_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with_tokenizer("olmoe", tmp_path / "source")
    options = PackOptions(calibrate=str(write_text(tmp_path / "text.txt")))
    small = pack(tmp_path / "source", tmp_path / "small", options=options)
    assert not (small.path / NETS_FILE).exists()
    monkeypatch.setattr(net_file, "MOST_OF_EXPERTS", 1e6)
    for name in ("one", "two"):
        store = pack(tmp_path / "source", tmp_path / name, options=options)
        assert store.verify() == []
        experts = max(layer.num_experts for layer in store.layers)
        after, ahead = load_nets(store.path / NETS_FILE, Shape(len(store.layers), experts, 2))
        assert after.bias_LHE.any()
        assert ahead.bias_LHE.any()
    assert (tmp_path / "one" / NETS_FILE).read_bytes() == (tmp_path / "two" / NETS_FILE).read_bytes()
