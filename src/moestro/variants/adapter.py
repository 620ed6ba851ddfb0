"""A LoRA adapter (PEFT's format) as a fine-tune: its base's checkpoint, whose tensors are read with the adapter added.

    W = W_base + (alpha / r) B A        alpha / sqrt(r) with use_rslora

Shapes: N rows (outputs), K columns (inputs), r rank.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from moestro.errors import VariantError
from moestro.store.checkpoint import Checkpoint
from moestro.store.quantised import SourceTensor
from moestro.store.safetensors_file import SafetensorsFile

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_NAME).is_file()


class AdaptedCheckpoint(Checkpoint):
    """The checkpoint in `base` with the adapter in `adapter` added to its tensors.

    Raises:
        VariantError: the adapter is not one of LoRA, is damaged, or is one of another model.
        CheckpointError: the base cannot be read.
    """

    def __init__(self, base: Path, adapter: Path) -> None:
        super().__init__(base)
        try:
            self._settings = _settings(adapter)
            file = self._open(_weights(adapter))
            self._add(file, adapter)
        except BaseException:
            self.close()
            raise
        self.files = (*self.files, file)

    def _add(self, file: SafetensorsFile, adapter: Path) -> None:
        for name in file.entries:
            target, half = _target(name)
            if half == _HALVES[1]:
                continue
            if half is None:
                self._replace(file, name, self._key(target, name, adapter))
                continue
            other = name.removesuffix(half) + _HALVES[1]
            key = self._key(f"{target}.weight", name, adapter)
            if other not in file.entries:
                raise _unusable(adapter, f"it has {name} without {other.rpartition('.lora_')[2]}")
            factors = (file.entries[name].shape, file.entries[other].shape)
            shape = self.tensors[key].shape
            turned = bool(self._settings.get("fan_in_fan_out"))
            (rank, columns), (rows, other_rank) = (one if len(one) == 2 else (0, 0) for one in factors)
            if rank == 0 or rank != other_rank or shape != ((columns, rows) if turned else (rows, columns)):
                raise _unusable(adapter, f"its factors {factors} of {target} do not fit a matrix {list(shape)}")
            scale = self._scale(target, rank)
            self.tensors[key] = _Adapted(self.tensors[key], file, (name, other), scale, turned=turned)

    def _key(self, target: str, name: str, adapter: Path) -> str:
        if target not in self.tensors:
            raise _unusable(adapter, f"it adapts {name}, and its base has no tensor {target}")
        return target

    def _replace(self, file: SafetensorsFile, name: str, key: str) -> None:
        if file.entries[name].shape != self.tensors[key].shape:
            raise VariantError(
                f"Tensor {name} of the adapter has shape {list(file.entries[name].shape)}, its base "
                f"{list(self.tensors[key].shape)}. Give an adapter of the store's base."
            )
        self.tensors[key] = _Whole(file, name)

    def _scale(self, module: str, rank: int) -> float:
        alpha = _of_module(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", rank))
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)


class _Whole(SourceTensor):
    """A tensor that the adapter has in full."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        self._file, self._name = file, name
        self.dtype, self.shape = file.entries[name].dtype, file.entries[name].shape

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        return self._file.read_rows(self._name, start, stop)


class _Adapted(SourceTensor):
    """A matrix and what the adapter adds to it."""

    def __init__(
        self, base: SourceTensor, file: SafetensorsFile, names: tuple[str, str], scale: float, *, turned: bool
    ) -> None:
        self._base, self._file, self._names, self._scale, self._turned = base, file, names, scale, turned
        self.dtype, self.shape = "F32", base.shape

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        a_rK, b_Nr = (self._file.read(name).float() for name in self._names)
        added = b_Nr @ a_rK[:, start:stop] if self._turned else b_Nr[start:stop] @ a_rK
        return self._base.read_rows(start, stop).float() + self._scale * (added.T if self._turned else added)


def _settings(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(adapter, f"{CONFIG_NAME} cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise _unusable(adapter, f"its peft_type is {kind!r}, expected 'LORA'")
    for name in ("use_dora", "lora_bias", "layer_replication"):
        if settings.get(name):
            raise _unusable(adapter, f"it uses {name}, which is not read")
    return settings


def _weights(adapter: Path) -> Path:
    path = adapter / WEIGHTS_NAME
    if not path.is_file():
        raise _unusable(adapter, f"it has no {WEIGHTS_NAME}")
    return path


def _target(name: str) -> tuple[str, str | None]:
    """The module that a factor is of, and which factor; for a tensor in full, its own name and None."""
    plain = name.removeprefix(_PREFIX)
    for half in _HALVES:
        if plain.endswith(half):
            return plain.removesuffix(half), half
    return plain.replace(".modules_to_save.", ".").replace(".base_layer.", "."), None


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's patterns are ends of module names."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _unusable(adapter: Path, detail: str) -> VariantError:
    return VariantError(
        f"The adapter {adapter} cannot be added: {detail}. Expected a LoRA adapter of the store's base in PEFT's "
        "format; or merge it into the weights and give that checkpoint."
    )
