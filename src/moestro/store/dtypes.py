"""Names of element types as in safetensors files, and what they are in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

STORED_FLOATS = ("BF16", "F16", "F32")
"""What the weights of a store may be."""

_SIZES = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch type."""
    return _NAMES[dtype]


def is_float(name: str) -> bool:
    """Whether elements of type `name` are floating-point numbers."""
    return TORCH_DTYPES[name].is_floating_point


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor of element type `dtype`."""
    return _SIZES[dtype] * math.prod(shape)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying."""
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)


def config_dtype(config: PreTrainedConfig) -> str:
    """The type that a config says the weights have, BF16 where it says nothing or they are quantised.

    To be asked before a model is built, which may change it.
    """
    dtype = getattr(config, "dtype", None)
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else "BF16"
    return name if name in STORED_FLOATS else "BF16"
