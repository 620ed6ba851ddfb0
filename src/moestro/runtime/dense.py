"""Dense weights: placed once, kept in their stored type, computed with by our kernels.

Shapes: N out, K in, T rows, R ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moestro.kernels.base import Kernels, MatrixSpec
from moestro.kernels.specs import FLAT_BITS
from moestro.runtime.lookup import RowsOnDisk
from moestro.runtime.narrow import guard

_CONVERSIONS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)
_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_ABOUT = frozenset({"__get__", "size", "dim", "numel", "data_ptr", "stride", "is_contiguous"})
"""Functions that only look at a tensor."""


class DenseWeight(torch.Tensor):
    """A matrix that behaves as an fp32 tensor but stays in its stored type (bf16, fp16 or fp32).

    Every linear map and embedding of a model meets its weight through `F.linear` or `F.embedding`, in routers that call
    them by hand too. Both are taken over here, so that any architecture runs on kernels that follow the one numeric
    rule, without a line of code per family. What else is done with the weight sees an fp32 copy.
    """

    kernels: Kernels

    @classmethod
    def over(cls, stored_NK: torch.Tensor, kernels: Kernels) -> DenseWeight:
        """Wrap a stored matrix without copying it."""
        weight: DenseWeight = stored_NK.as_subclass(cls)
        weight.kernels = kernels
        return weight

    def product(self, rows_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """The linear map of fp32 rows, [T, N]."""
        return self.kernels.linear(rows_TK, self, bias_N)

    def rows(self, ids_R: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix in fp32, [R, K]."""
        return self.as_subclass(torch.Tensor)[ids_R].to(torch.float32)

    def unpacked(self) -> torch.Tensor:
        """The whole matrix as an ordinary tensor, fp32 [N, K]."""
        return self.as_subclass(torch.Tensor).float()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func in _CONVERSIONS and _converts_to_fp32(args[1:], kwargs):
            return args[0]
        if func == _DTYPE:
            return torch.float32
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in _ABOUT:
                return func(*args, **kwargs)
            return func(*(_as_fp32(arg) for arg in args), **{key: _as_fp32(arg) for key, arg in kwargs.items()})


def stored(weight: torch.Tensor) -> torch.Tensor:
    """The matrix behind a placed weight, in its stored type."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(torch.Tensor)


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised dense matrix as it lies in memory: its bytes and what they are."""

    bytes: torch.Tensor
    spec: MatrixSpec


class Bodiless(DenseWeight):
    """A DenseWeight that has a shape, but no storage of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} met a matrix that is no tensor")


class LookupWeight(Bodiless):
    """A DenseWeight of which only rows are looked up, from disk."""

    matrix: RowsOnDisk

    @classmethod
    def of(cls, matrix: RowsOnDisk, kernels: Kernels) -> LookupWeight:
        """Wrap a matrix on disk."""
        weight: LookupWeight = torch.Tensor._make_wrapper_subclass(cls, matrix.shape, dtype=torch.float32)
        weight.kernels, weight.matrix = kernels, matrix
        return weight

    def product(self, rows_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002
        raise AssertionError(f"{self.matrix.name} is on disk to be looked up, not to be multiplied with")

    def rows(self, ids_R: torch.Tensor) -> torch.Tensor:
        return self.matrix.table_CK[self.matrix.places(ids_R)].to(torch.float32)

    def unpacked(self) -> torch.Tensor:
        raise AssertionError(f"{self.matrix.name} is on disk to be looked up, not to be used as a whole")


class PackedWeight(Bodiless):
    """A DenseWeight whose values are codes of 8 or 4 bits."""

    matrix: PackedMatrix

    @classmethod
    def of(cls, matrix: PackedMatrix, kernels: Kernels) -> PackedWeight:
        """Wrap a quantised matrix without copying it."""
        shape = (matrix.spec.rows, matrix.spec.columns)
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        weight.kernels, weight.matrix = kernels, matrix
        return weight

    def product(self, rows_TK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        spec = self.matrix.spec
        return self.kernels.packed_linear(rows_TK, spec, self._planes(), FLAT_BITS[spec.encoding], bias_N)

    def rows(self, ids_R: torch.Tensor) -> torch.Tensor:
        return self.kernels.packed_rows(self.matrix.spec, self._planes(), ids_R)

    def unpacked(self) -> torch.Tensor:
        spec = self.matrix.spec
        return self.kernels.unpack(spec, self._planes(), FLAT_BITS[spec.encoding])

    def _planes(self) -> tuple[int, ...]:
        return (self.matrix.bytes.data_ptr(),)


Stored = torch.Tensor | PackedMatrix | RowsOnDisk
"""A dense tensor of a store: as it was, quantised, or left on disk."""


def place_dense(model: nn.Module, tensors: Mapping[str, Stored], kernels: Kernels) -> None:
    """Put the stored dense tensors into the model in place of its meta parameters and buffers."""
    put_tensors(model, {name: placed(tensor, kernels) for name, tensor in tensors.items()})


def put_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors into the model as they are, in every place where the one of that name is used."""
    replaced: dict[int, torch.Tensor] = {}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        replaced[id(named[name])] = tensor
    for name, old in named.items():
        if id(old) in replaced:
            _replace(model, name, replaced[id(old)])


def placed(tensor: Stored, kernels: Kernels) -> torch.Tensor:
    """What a model meets in the place of a stored tensor."""
    if isinstance(tensor, RowsOnDisk):
        return LookupWeight.of(tensor, kernels)
    if isinstance(tensor, PackedMatrix):
        return PackedWeight.of(tensor, kernels)
    if not tensor.is_floating_point():
        return tensor
    return DenseWeight.over(tensor, kernels) if tensor.ndim == 2 else tensor.float()


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        # Not wrapped in nn.Parameter, which insists that detach() keeps the type: nothing here is ever trained.
        module._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        module._buffers[leaf] = tensor


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    assert isinstance(weight, DenseWeight), "a dense weight was used as the input of a linear map"
    with torch._C.DisableTorchFunctionSubclass():
        rows_TK = input.reshape(-1, input.shape[-1]).to(torch.float32).contiguous()
        result_TN = weight.product(rows_TK, bias)
        return guard(result_TN.view(*input.shape[:-1], weight.shape[0]))


def _embedding(input: torch.Tensor, weight: Any, *_: Any, **__: Any) -> torch.Tensor:
    assert isinstance(weight, DenseWeight), "a dense weight was used as the ids of an embedding"
    with torch._C.DisableTorchFunctionSubclass():
        return weight.rows(input.reshape(-1)).view(*input.shape, weight.shape[1])


def _converts_to_fp32(args: Any, kwargs: Any) -> bool:
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    return all(dtype == torch.float32 for dtype in dtypes)


def _as_fp32(value: Any) -> Any:
    return value.unpacked() if isinstance(value, DenseWeight) else value
