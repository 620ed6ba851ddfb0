"""Quantised checkpoints made by hand, as their publishers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from families import save_checkpoint


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Replace a checkpoint's tensors and state how they are quantised."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A gpt-oss checkpoint with random MXFP4 experts; returns its tensors."""
    save_checkpoint("gpt_oss", folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 128, shape, generator=generator, dtype=torch.uint8)
    rewrite(folder, tensors, {"quant_method": "mxfp4"})
    return tensors


def save_fp8(folder: Path, tile: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A DeepSeek-V3 checkpoint with all projections in block fp8; returns its tensors."""
    save_checkpoint("deepseek_v3", folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("proj.weight") or "kv_a_proj_with_mqa" in name:
            rows, columns = tensor.shape
            scales = torch.rand(-(-rows // tile[0]), -(-columns // tile[1]), generator=generator) + 0.01
            tensors[name] = (tensor.float() * 8).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    rewrite(
        folder,
        tensors,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(tile)},
    )
    return tensors
