"""A checkpoint whose experts are a little off those of the built-in model: something to be measured against it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moestro.store.locate import locate_source

MODEL = "tiny-qwen3moe-28m"

TEXT = """\
import os

def walk(path):
    for name in sorted(os.listdir(path)):
        whole = os.path.join(path, name)
        if os.path.isdir(whole):
            yield from walk(whole)
        else:
            yield whole

Mixture \\Mix"ture\\, n. [L. mixtura.]
   1. The act of mixing, or the state of being mixed.

Der Befehl gibt die Namen aller Dateien im angegebenen Verzeichnis aus.
"""


def perturbed_checkpoint(folder: Path, noise: float = 0.3) -> Path:
    """A copy of the built-in model with every expert weight multiplied by 1 + noise * (a normal random number)."""
    shutil.copytree(locate_source(MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, values in sorted(weights.items()):
        if ".experts." in name:
            factors = 1 + noise * torch.randn(values.shape, generator=generator)
            weights[name] = (values.float() * factors).to(values.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
