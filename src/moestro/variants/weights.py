"""The weights of a base and of a fine-tune, tensor by tensor, wherever they are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from moestro.config import RAW, PackOptions
from moestro.errors import MoestroError, StoreError, VariantError
from moestro.hf.skeleton import Skeleton
from moestro.store.checkpoint import Checkpoint
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.fingerprint import fingerprint
from moestro.store.locate import BUILT_IN, locate_source
from moestro.store.origin import read_origin
from moestro.store.pack_plan import PackPlan, plan_pack
from moestro.store.reader import Store
from moestro.store.sources import SourceReader

_ONE_AT_A_TIME = threading.Lock()
"""transformers' converters, which both models share, keep what they convert in themselves."""


class Weights(Protocol):
    """All parameters of a model. Close it after use."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that is read, if it is one."""

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The parameters of one expert in canonical layout, contiguous fp32. Raises MoestroError."""

    def dense(self, name: str) -> torch.Tensor:
        """A tensor that is not an expert's, in the type in which it is kept. Raises MoestroError."""

    def close(self) -> None:
        """Close all files."""


class CheckpointWeights:
    """The weights of an open checkpoint, for the model of `skeleton`; takes the checkpoint over.

    Raises:
        CheckpointError: tensors are missing or of other shapes.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self._checkpoint = checkpoint
        try:
            self.plan: PackPlan = plan_pack(checkpoint, skeleton, PackOptions(levels=RAW))
        except BaseException:
            checkpoint.close()
            raise
        self._reader = SourceReader(self.plan, checkpoint)
        self._dense = {source.name: source for source in self.plan.dense_sources}

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is read."""
        return self._checkpoint

    @property
    def ignored(self) -> tuple[str, ...]:
        """Its keys that the model does not use."""
        return self.plan.source.ignored

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """See `Weights`."""
        with _ONE_AT_A_TIME:
            return self._reader.finite_expert(self.plan.expert_of(self.plan.expert_unit(layer, expert)))

    def dense(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        with _ONE_AT_A_TIME:
            return self._reader.dense(self._dense[name])

    def dense_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that is not an expert's, by name, in the type in which a raw store would hold it."""
        return self._reader.raw_dense()

    def close(self) -> None:
        """Close all files."""
        self._checkpoint.close()


class StoreWeights:
    """The weights of a raw store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def checkpoint(self) -> None:
        """None."""
        return

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """See `Weights`."""
        extent = self._store.plane((layer, expert, 0))
        (plane,) = self._store.layers[layer].layout.planes
        data = _read(extent.file, extent.offset, extent.nbytes)
        return {
            one.name: data[one.offset : one.offset + one.nbytes].view(TORCH_DTYPES[one.dtype]).view(one.shape).float()
            for one in plane.tensors
        }

    def dense(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        one = self._store.dense[name]
        return _read(self._store.dense_file, one.offset, one.nbytes).view(TORCH_DTYPES[one.dtype]).view(one.shape)

    def close(self) -> None:
        """Nothing is open."""


def open_base(store: Store, base: str, skeleton: Skeleton) -> Weights:
    """The weights that the store was packed from: `base` (a checkpoint) if it is given, else wherever they are found.

    Raises:
        VariantError: `base` is another checkpoint, or the store's own is not to be found.
        MoestroError: `base` is no checkpoint, or cannot be read.
    """
    wanted = store.manifest.source.fingerprint
    if base:
        checkpoint = Checkpoint(locate_source(base))
        found = fingerprint(checkpoint)
        if found != wanted:
            checkpoint.close()
            raise VariantError(
                f"{base} is not the base of the store {store.path}: its fingerprint is {found}, the store was packed "
                f"from {wanted}. Give the checkpoint that was packed."
            )
        return CheckpointWeights(checkpoint, skeleton)
    places = [locate_source(name) for name in BUILT_IN]
    origin = read_origin(store.path)
    for folder in (*places, *([origin] if origin else [])):
        known = _checkpoint_of(folder, wanted)
        if known is not None:
            return CheckpointWeights(known, skeleton)
    if store.manifest.encoding == RAW:
        return StoreWeights(store)
    noted = f"it was packed from {origin}, where it no longer is" if origin else "where it lies is not noted"
    raise VariantError(
        f"A variant is the difference to the checkpoint that {store.path} was packed from, and {noted}. "
        f"Give that checkpoint with --base (its fingerprint is {wanted})."
    )


def _checkpoint_of(folder: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint in `folder` if it is there and has this fingerprint."""
    try:
        checkpoint = Checkpoint(folder)
    except MoestroError:
        return None
    try:
        if fingerprint(checkpoint) == wanted:
            return checkpoint
    except MoestroError:
        pass  # what cannot be read cannot be the base
    checkpoint.close()
    return None


def _read(file: Path, offset: int, nbytes: int) -> torch.Tensor:
    data = bytearray(nbytes)
    with file.open("rb", buffering=0) as stream:
        if os.preadv(stream.fileno(), [data], offset) != nbytes:
            raise StoreError(f"{file} ends before byte {offset + nbytes}. Copy it again, or pack the model again.")
    return torch.frombuffer(data, dtype=torch.uint8)
