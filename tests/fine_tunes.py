"""A tiny fine-tune of a tiny model: the base's checkpoint with some of its values moved a little."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from families import save_checkpoint

Tensors = dict[str, torch.Tensor]


def base_checkpoint(folder: Path, family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of a family."""
    save_checkpoint(family, folder, dtype=dtype)
    return folder


def fine_tune(base: Path, folder: Path, *, size: float = 0.1, seed: int = 1) -> Path:
    """Every value moved by a random part of its tensor's size, matrices by more in a few input channels."""
    generator = torch.Generator().manual_seed(seed)

    def move(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                noise[..., ::37] *= 4
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 1.0
            tensors[name] = (tensor.float() + size * spread * noise).to(tensor.dtype)

    return edited(base, folder, move)


def edited(base: Path, folder: Path, edit: Callable[[Tensors], None]) -> Path:
    """A copy of a checkpoint whose tensors `edit` may change, add and delete."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
