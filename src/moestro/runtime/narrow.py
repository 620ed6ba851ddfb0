"""Elementwise functions whose results do not depend on where in a tensor an element lies.

torch runs sigmoid, exp and the like on groups of 16 or 32 elements and the rest one by one, with other last bits. A
matrix whose rows are a multiple of 32 wide is safe: every element is in a full group. Outputs of linear maps that are
narrower (a gate of one value per token, a router over 8 experts) are not: there a token's result would depend on how
many tokens share its step. Padding to full groups makes it the same always.

Shapes: T rows, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

GROUP = 32
"""A multiple of what torch's kernels handle at once: 16 floats with AVX2, 32 with AVX-512."""

_ELEMENTWISE = frozenset(
    {
        *(torch.sigmoid, torch.exp, torch.tanh, F.sigmoid, F.tanh),
        *(torch.Tensor.sigmoid, torch.Tensor.exp, torch.Tensor.tanh),
        *(F.silu, F.softplus, F.gelu),
    }
)
_KEEPS_VALUES = frozenset(
    {
        *(torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.unsqueeze, torch.Tensor.squeeze),
        *(torch.Tensor.float, torch.Tensor.to, torch.Tensor.type, torch.Tensor.contiguous),
    }
)


class NarrowOutput(torch.Tensor):
    """Output of a narrow linear map. What is computed from it elementwise is an ordinary tensor again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ELEMENTWISE:
                return _padded(func, args[0], *args[1:], **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func in _KEEPS_VALUES else plain(result)


def guard(output_TN: torch.Tensor) -> torch.Tensor:
    """`output_TN`, as a NarrowOutput if elementwise functions of it need care."""
    return output_TN if output_TN.shape[-1] % GROUP == 0 else output_TN.as_subclass(NarrowOutput)


def plain(value: Any) -> Any:
    """`value` without the wrapper."""
    return value.as_subclass(torch.Tensor) if isinstance(value, NarrowOutput) else value


def _padded(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    flat = plain(tensor).reshape(-1)
    result: torch.Tensor = func(F.pad(flat, (0, -flat.numel() % GROUP)), *args, **kwargs)
    return result[: flat.numel()].view(tensor.shape)
