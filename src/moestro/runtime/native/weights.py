"""Weights that are in place, as the compiled decoder is told of them: addresses, which somebody else keeps."""

from __future__ import annotations

from typing import Any

import torch

from moestro import _native
from moestro.kernels.base import WEIGHT_DTYPES
from moestro.runtime.dense import LookupWeight, PackedWeight, stored

_KINDS = {"flat8": 3, "flat4": 4}


def weight_of(weight_NK: Any, bias_N: torch.Tensor | None) -> _native.Weight:
    """A matrix with its bias."""
    outputs, inputs = weight_NK.shape
    bias = 0 if bias_N is None else floats(bias_N)
    if isinstance(weight_NK, PackedWeight):
        packed, (offset,) = weight_NK.matrix, weight_NK.matrix.spec.offsets
        kind, data, group = _KINDS[packed.spec.encoding], packed.bytes.data_ptr() + offset, packed.spec.group
    else:
        on_disk = isinstance(weight_NK, LookupWeight)
        plain_NK = weight_NK.matrix.table_CK if on_disk else stored(weight_NK)
        outputs = len(plain_NK)
        assert plain_NK.is_contiguous()
        kind, data, group = WEIGHT_DTYPES.index(plain_NK.dtype), plain_NK.data_ptr(), 0
    return _native.Weight(kind=kind, data=data, outputs=outputs, inputs=inputs, group=group, bias=bias)


def norm_of(weight: torch.Tensor, module: Any) -> _native.Norm:
    """A norm like `module`, by these weights."""
    return _native.Norm(floats(weight), weight.numel(), module.variance_epsilon)


def floats(vector: Any) -> int:
    """The address of a vector of fp32."""
    assert vector.dtype is torch.float32
    assert vector.is_contiguous()
    return int(vector.data_ptr())
