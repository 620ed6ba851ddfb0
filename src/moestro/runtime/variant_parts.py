"""The dense parts of a variant: read into memory in one go, and put into the model for as long as its rows run.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import xxhash
from torch import nn

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.hf.skeleton import Skeleton
from moestro.kernels.base import Kernels
from moestro.memory.direct import FileReader, KeptFile
from moestro.memory.pages import PAGE, HostBuffer, round_up
from moestro.quant.groups import group_size
from moestro.quant.low_rank import Region
from moestro.runtime.delta_weight import DeltaWeight
from moestro.runtime.dense import DenseWeight, placed
from moestro.runtime.slots import DTYPES
from moestro.store.manifest import DenseTensor
from moestro.store.variant_file import StoredVariant
from moestro.store.variant_manifest import DenseDelta


class DeltaAt(NamedTuple):
    """The delta of a dense matrix in memory."""

    region: Region
    address: int


class DenseParts:
    """What a variant changes beside its experts, in memory: `deltas` of matrices and `replaced` tensors, by name."""

    def __init__(self, stored: StoredVariant, file: KeptFile, reader: FileReader) -> None:
        """Raises PlaneReadError when the file cannot be read, or is damaged."""
        size = stored.dense_nbytes
        self._buffer = HostBuffer(parts_bytes(stored))
        try:
            reader.read_to_end(file, size, self._buffer.view(0, self._buffer.nbytes))
        except (OSError, EOFError) as error:
            self._buffer.close()
            raise PlaneReadError(
                f"The dense parts of the variant {stored.name} in {stored.dense_file} could not be read: {error}. "
                "Check the disk, then remove the variant and add it again."
            ) from error
        try:
            self._check(stored)
        except PlaneReadError:
            self._buffer.close()
            raise
        whole = self._buffer.tensor
        address = self._buffer.address
        self.deltas = {name: DeltaAt(one.region, address + one.offset) for name, one in stored.dense_deltas.items()}
        self.replaced = {
            name: whole[one.offset : one.offset + one.nbytes].view(DTYPES[one.dtype]).view(one.shape)
            for name, one in stored.replacements.items()
        }

    @property
    def nbytes(self) -> int:
        """Of the memory that they take."""
        return self._buffer.nbytes

    def close(self) -> None:
        """Give the memory back. Nothing may use the tensors any more."""
        self.deltas, self.replaced = {}, {}
        self._buffer.close()

    def _check(self, stored: StoredVariant) -> None:
        parts: dict[str, DenseDelta | DenseTensor] = {**stored.dense_deltas, **stored.replacements}
        for name, one in parts.items():
            actual = xxhash.xxh3_64_intdigest(self._buffer.view(one.offset, one.nbytes))
            if actual != one.checksum:
                raise PlaneReadError(
                    f"What the variant {stored.name} has of {name} ({one.nbytes} bytes at offset {one.offset} of "
                    f"{stored.dense_file}) is damaged: its checksum is {actual:016x}, expected {one.checksum:016x}. "
                    "Remove the variant and add it again."
                )


def scratch_bytes(skeleton: Skeleton, rows: int) -> int:
    """What kernels keep for the deltas of a step in a model without packed matrices: its rows, quantised."""
    shapes = [shape for shape, _ in skeleton.dense.values()]
    shapes += [param.shape for layer in skeleton.expert_layers for param in layer.params]
    widths = {shape[1] for shape in shapes if len(shape) == 2}
    return max(_native.quantised_bytes(rows, width, group_size(width)) for width in widths)


def parts_bytes(stored: StoredVariant) -> int:
    """Memory for the dense parts of a variant."""
    return round_up(max(1, stored.dense_nbytes), PAGE)


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    holder: dict[str, Any]
    leaf: str


class Wardrobe:
    """Puts the dense parts of variants into a model whose own weights are in place, and takes them off again."""

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        self._kernels = kernels
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self._own = {id(tensor): tensor for tensor in self._tensors.values()}
        self._places: dict[int, list[_Place]] = {}
        for module in model.modules():
            for holder in (module._parameters, module._buffers):
                for leaf, tensor in holder.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), []).append(_Place(holder, leaf))

    def tensors(self, parts: DenseParts) -> dict[int, torch.Tensor]:
        """What a model meets in the places of the tensors that a variant changed, by the id of these."""
        changed: dict[int, torch.Tensor] = {}
        for name, delta in parts.deltas.items():
            base = self._tensors[name]
            assert isinstance(base, DenseWeight), name
            changed[id(base)] = DeltaWeight.of(base, delta.region, delta.address, self._kernels)
        for name, tensor in parts.replaced.items():
            changed[id(self._tensors[name])] = placed(tensor, self._kernels)
        return changed

    @contextmanager
    def wearing(self, changed: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Within, the model has these tensors."""
        try:
            for own, tensor in changed.items():
                self._put(own, tensor)
            yield
        finally:
            for own in changed:
                self._put(own, self._own[own])

    def _put(self, own: int, tensor: torch.Tensor) -> None:
        for holder, leaf in self._places[own]:
            holder[leaf] = tensor
