"""A checkpoint's tensors as the values they stand for, whatever they are stored as.

Shapes: E experts, R rows, G groups, C columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from moestro.errors import CheckpointError
from moestro.hf.skeleton import READABLE_QUANTISATION
from moestro.store.dequantise import MXFP4_BLOCK_BYTES, block_values, mxfp4_values
from moestro.store.safetensors_file import SafetensorsFile, TensorEntry

_BLOCKS, _SCALES, _SCALE_INV = "_blocks", "_scales", "_scale_inv"
_FP8 = ("F8_E4M3", "F8_E5M2")


class SourceTensor(ABC):
    """A tensor that can be read: `dtype` is the stored type of its values (BF16 where they were quantised)."""

    dtype: str
    shape: tuple[int, ...]

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` along the first dimension; fp32 where the values were quantised."""

    def read(self) -> torch.Tensor:
        """All values."""
        return self.read_rows(0, self.shape[0])


class PlainTensor(SourceTensor):
    """A tensor that is stored as it is."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        self._file, self._name = file, name
        self.dtype, self.shape = file.entries[name].dtype, file.entries[name].shape

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        return self._file.read_rows(self._name, start, stop)

    def read(self) -> torch.Tensor:
        return self._file.read(self._name)


class Mxfp4Tensor(SourceTensor):
    """gpt-oss experts: blocks [E, R, G, 16] and scales [E, R, G] stand for a tensor [E, 32 G, R] (in, out)."""

    def __init__(self, blocks: PlainTensor, scales: PlainTensor) -> None:
        experts, rows, groups, _ = blocks.shape
        self._blocks, self._scales = blocks, scales
        self.dtype, self.shape = "BF16", (experts, groups * 2 * MXFP4_BLOCK_BYTES, rows)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        values_ERC = mxfp4_values(self._blocks.read_rows(start, stop), self._scales.read_rows(start, stop))
        return values_ERC.transpose(1, 2)


class BlockFp8Tensor(SourceTensor):
    """An fp8 matrix [R, C], or a stack of them [E, R, C], with one scale per tile."""

    def __init__(self, weight: PlainTensor, scales: PlainTensor, tile: tuple[int, int]) -> None:
        self._weight, self._scales, self._tile = weight, scales, tile
        self.dtype, self.shape = "BF16", weight.shape

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        weight = self._weight.read_rows(start, stop)
        if len(self.shape) == 2:
            return block_values(weight, self._scales.read(), self._tile, first_row=start)
        return block_values(weight, self._scales.read_rows(start, stop), self._tile)


def sources_of(files: Iterable[SafetensorsFile], settings: dict[str, Any] | None) -> dict[str, SourceTensor]:
    """All tensors by key. `settings` is the config's `quantization_config`.

    Raises:
        CheckpointError: a key occurs twice, a quantised tensor lacks its scales, or the method is not one we read.
    """
    plain: dict[str, PlainTensor] = {}
    for file in files:
        for name in file.entries:
            if name in plain:
                raise CheckpointError(f"Tensor {name} occurs twice in the checkpoint, again in {file.path}.")
            plain[name] = PlainTensor(file, name)
    if settings is None:
        sources: dict[str, SourceTensor] = dict(plain)
    else:
        sources = _dequantised(plain, settings)
    for name, source in sources.items():
        if source.dtype in _FP8:
            raise CheckpointError(
                f"Tensor {name} holds fp8 numbers without scales. Expected a tensor {name}{_SCALE_INV} beside it and a "
                "quantization_config of method fp8 in config.json."
            )
    return sources


def _dequantised(plain: dict[str, PlainTensor], settings: dict[str, Any]) -> dict[str, SourceTensor]:
    method = settings.get("quant_method")
    if method == "mxfp4":
        return _mxfp4_sources(plain)
    if method == "fp8":
        return _fp8_sources(plain, settings.get("weight_block_size"))
    raise CheckpointError(
        f"The checkpoint is quantised with {method!r}, which moestro cannot read. Expected bf16, fp16 or fp32 weights, "
        f"or one of: {', '.join(READABLE_QUANTISATION)}. Take the unquantised model."
    )


def _mxfp4_sources(plain: dict[str, PlainTensor]) -> dict[str, SourceTensor]:
    sources: dict[str, SourceTensor] = {}
    for name, tensor in plain.items():
        base = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in plain:
            continue
        if base == name:
            sources[name] = tensor
            continue
        scales = plain.get(base + _SCALES)
        if (
            scales is None
            or len(tensor.shape) != 4
            or tensor.shape[-1] != MXFP4_BLOCK_BYTES
            or scales.shape != tensor.shape[:-1]
            or (tensor.dtype, scales.dtype) != ("U8", "U8")
        ):
            raise CheckpointError(
                f"The MXFP4 tensor {name} {tensor.dtype}{list(tensor.shape)} is not as expected: bytes "
                f"[experts, rows, groups, {MXFP4_BLOCK_BYTES}] and {base}{_SCALES} of bytes [experts, rows, groups]. "
                "Download the checkpoint again."
            )
        sources[base] = Mxfp4Tensor(tensor, scales)
    return sources


def _fp8_sources(plain: dict[str, PlainTensor], block_size: Any) -> dict[str, SourceTensor]:
    sources: dict[str, SourceTensor] = {}
    for name, tensor in plain.items():
        if name.endswith(_SCALE_INV) and name.removesuffix(_SCALE_INV) in plain:
            continue
        scales = plain.get(name + _SCALE_INV)
        if scales is None:
            sources[name] = tensor
            continue
        if tensor.dtype not in _FP8:
            raise CheckpointError(
                f"Tensor {name} has scales but holds {tensor.dtype}, expected one of {', '.join(_FP8)}. "
                "Take the unquantised model."
            )
        sources[name] = BlockFp8Tensor(tensor, scales, _tile(name, tensor.shape, scales.shape, block_size))
    return sources


def _tile(name: str, shape: tuple[int, ...], scales: tuple[int, ...], block_size: Any) -> tuple[int, int]:
    if len(shape) in (2, 3) and isinstance(block_size, list | tuple) and len(block_size) == 2:
        rows, columns = int(block_size[0]), int(block_size[1])
        if min(rows, columns) > 0 and scales == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)):
            return rows, columns
    raise CheckpointError(
        f"The scales of the fp8 tensor {name} {list(shape)} have shape {list(scales)}, which does not match the "
        f"config's weight_block_size {block_size!r}. Expected block fp8 as in DeepSeek-V3; take the unquantised model."
    )


def entries_of(files: Iterable[SafetensorsFile]) -> Iterable[tuple[SafetensorsFile, str, TensorEntry]]:
    """Every stored tensor of every file, in a fixed order."""
    for file in files:
        for name in sorted(file.entries):
            yield file, name, file.entries[name]
