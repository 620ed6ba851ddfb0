"""Which element type each tensor is stored in, and the cast to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from moestro.errors import CheckpointError
from moestro.hf.skeleton import Skeleton
from moestro.store.dtypes import dtype_name, is_float

DTYPE_OPTIONS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "BF16": "BF16", "F16": "F16", "F32": "F32"}
"""What `--dtype` takes, and the stored type it means."""

_EXACT_IN = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",)}


def parse_dtype(option: str) -> str:
    """The stored type that an option names. Raises CheckpointError."""
    try:
        return DTYPE_OPTIONS[option]
    except KeyError:
        raise CheckpointError(
            f"The dtype {option!r} is unknown. Expected one of: {', '.join(DTYPE_OPTIONS)}."
        ) from None


def common_dtype(source_dtypes: Iterable[str]) -> str:
    """The narrowest stored type that holds all of these float types without loss (F32 for F64).

    Raises:
        CheckpointError: some are not floats.
    """
    found = set(source_dtypes)
    integers = sorted(dtype for dtype in found if not is_float(dtype))
    if integers:
        raise CheckpointError(
            f"The experts are stored as {', '.join(integers)}, expected floating-point numbers: an unquantised "
            "checkpoint, or one whose config.json has a quantization_config of method mxfp4 or fp8."
        )
    for dtype in ("BF16", "F16"):
        if found == {dtype}:
            return dtype
    return "F32"


def fp32_names(skeleton: Skeleton, target: str) -> frozenset[str]:
    """The dense tensors that transformers itself keeps in fp32 when the model is loaded in `target`."""
    kept = set(getattr(skeleton.model, "_keep_in_fp32_modules_strict", None) or ())
    if target == "F16":
        kept |= set(getattr(skeleton.model, "_keep_in_fp32_modules", None) or ())
    pattern = re.compile("|".join(sorted(entry.replace("*", ".*") for entry in kept)) or r"(?!)")
    return frozenset(name for name in skeleton.dense if pattern.search(name))


def dense_dtype(shape: Sequence[int], source: str, target: str, *, forced: bool, keep_fp32: bool) -> str:
    """The type in which a dense tensor is stored.

    Integers stay what they are. Vectors (norms, biases) and what the model keeps in fp32 become F32: they are tiny, and
    no loss there is worth it. Matrices get the target type; unless the user asked for that type (`forced`), those that
    would lose bits stay F32.
    """
    if not is_float(source):
        return source
    if len(shape) < 2 or keep_fp32:
        return "F32"
    if not forced and target not in _EXACT_IN.get(source, ("F32",)):
        return "F32"
    return target


class CastOverflowError(CheckpointError):
    """Finite values of a checkpoint are too large for the dtype that was asked for."""


class NotFiniteError(CheckpointError):
    """A checkpoint holds NaN or infinities, which cannot be quantised."""


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise NotFiniteError, which names the tensor, unless all values are numbers."""
    if not values.is_floating_point():
        return
    bad = int((~values.isfinite()).sum())
    if bad:
        raise NotFiniteError(
            f"Tensor {name} holds {bad} value(s) that are NaN or infinite, which cannot be quantised. Download or copy "
            "the checkpoint again; `moestro pack --levels raw` keeps weights as they are."
        )


def cast_into(destination: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """Copy `values` into `destination`, which has the same shape and the stored type.

    Raises:
        CastOverflowError: finite values would become infinite; names the tensor.
    """
    destination.copy_(values)
    if destination.dtype in (values.dtype, torch.float32) or not destination.is_floating_point():
        return
    overflown = destination.isinf() & values.isfinite()
    if bool(overflown.any()):
        largest = values[overflown].abs().max().item()
        raise CastOverflowError(
            f"Tensor {name} has values up to {largest:.6g}, more than {dtype_name(destination.dtype)} can hold. "
            "Pack with --dtype bfloat16 or --dtype float32."
        )
