"""Packing needs the memory of a few experts, not of a layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GraniteMoeConfig, PreTrainedConfig, Qwen3MoeConfig

from moestro.hf.skeleton import build_skeleton, load_config
from packing import pack_raw
from store.crash import run

_HIDDEN, _WIDTH, _EXPERTS = 512, 1024, 32
_EXPERT_BYTES = 3 * _HIDDEN * _WIDTH * 2
_COMMON = {
    "vocab_size": 64,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
}


def _single(folder: Path) -> None:
    """One layer, every expert in tensors of its own."""
    config = Qwen3MoeConfig(**_COMMON, num_experts=_EXPERTS, moe_intermediate_size=_WIDTH, head_dim=128)
    prefix = "model.layers.0.mlp.experts"
    shapes = {}
    for expert in range(_EXPERTS):
        shapes[f"{prefix}.{expert}.gate_proj.weight"] = (_WIDTH, _HIDDEN)
        shapes[f"{prefix}.{expert}.up_proj.weight"] = (_WIDTH, _HIDDEN)
        shapes[f"{prefix}.{expert}.down_proj.weight"] = (_HIDDEN, _WIDTH)
    _save(config, shapes, folder)


def _stacked(folder: Path) -> None:
    """One layer, all experts in one tensor."""
    config = GraniteMoeConfig(**_COMMON, num_local_experts=_EXPERTS, intermediate_size=_WIDTH)
    prefix = "model.layers.0.block_sparse_moe"
    shapes = {
        f"{prefix}.experts.gate_up_proj": (_EXPERTS, 2 * _WIDTH, _HIDDEN),
        f"{prefix}.experts.down_proj": (_EXPERTS, _HIDDEN, _WIDTH),
    }
    _save(config, shapes, folder)


def _save(config: PreTrainedConfig, experts: dict[str, tuple[int, ...]], folder: Path) -> None:
    config.save_pretrained(folder)
    dense = {name: shape for name, (shape, _) in build_skeleton(load_config(folder)).dense.items()}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in {**dense, **experts}.items()}
    save_file(tensors, folder / "model.safetensors")


def pack_measured(source: Path, destination: Path, report: Path) -> None:
    """Pack in this process; report its peak resident bytes before and after."""
    build_skeleton(load_config(source))
    before = _peak_bytes()
    pack_raw(source, destination)
    report.write_text(json.dumps([before, _peak_bytes()]))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("write", [_single, _stacked])
def test_memory_is_a_few_experts(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "source")
    assert run(pack_measured, tmp_path / "source", tmp_path / "store", tmp_path / "report") == 0
    before, after = json.loads((tmp_path / "report").read_text())
    assert after - before < 8 * _EXPERT_BYTES
    assert (tmp_path / "store" / "experts.planes").stat().st_size == _EXPERTS * _EXPERT_BYTES
