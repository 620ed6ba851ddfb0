"""Adding a variant needs the memory of a few experts, not of a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeConfig

from fine_tunes import Tensors, edited
from moestro.config import VariantOptions
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.reader import Store
from moestro.variants.add import add_variant
from packing import pack_raw
from store.crash import run

_HIDDEN, _WIDTH, _EXPERTS = 256, 256, 96
_EXPERT_BYTES = 4 * 3 * _HIDDEN * _WIDTH
"""Of one expert in fp32."""


def _base(folder: Path) -> Path:
    config = GraniteMoeConfig(
        vocab_size=64,
        hidden_size=_HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=_EXPERTS,
        intermediate_size=_WIDTH,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    prefix = "model.layers.0.block_sparse_moe.experts"
    shapes = {
        **{name: shape for name, (shape, _) in build_skeleton(load_config(folder)).dense.items()},
        f"{prefix}.gate_up_proj": (_EXPERTS, 2 * _WIDTH, _HIDDEN),
        f"{prefix}.down_proj": (_EXPERTS, _HIDDEN, _WIDTH),
    }
    save_file(
        {name: torch.randn(one, dtype=torch.bfloat16) for name, one in shapes.items()}, folder / "model.safetensors"
    )
    return folder


def _move(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor * 1.05


def add_measured(store: Path, tuned: Path, report: Path) -> None:
    """Add in this process; report its peak resident bytes before and after."""
    build_skeleton(load_config(tuned))
    before = _peak_bytes()
    add_variant(Store.open(store), "one", str(tuned), options=VariantOptions(calibration=False))
    report.write_text(json.dumps([before, _peak_bytes()]))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def test_memory_is_a_few_experts(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    tuned = edited(base, tmp_path / "tuned", _move)
    store = pack_raw(base, tmp_path / "store").path
    assert run(add_measured, store, tuned, tmp_path / "report") == 0
    before, after = json.loads((tmp_path / "report").read_text())
    # Both models are twice that; a few experts and what fits their codes took 60 experts' worth when this was written.
    assert len(load_file(store / "variants" / "one" / "dense.safetensors")) > 0
    assert after - before < _EXPERTS * _EXPERT_BYTES, (after - before) / _EXPERT_BYTES
