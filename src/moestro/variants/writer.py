"""Writing a variant's files: under another name until all of it is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from moestro.errors import StoreError, VariantError
from moestro.store.calibration_facts import CalibrationText
from moestro.store.casting import cast_into
from moestro.store.checksum import checksum
from moestro.store.disk import FolderLock, check_free, sync_file, write_all, write_durably
from moestro.store.dtypes import TORCH_DTYPES, byte_view
from moestro.store.manifest import DenseTensor, FileEntry
from moestro.store.reader import Store
from moestro.store.variant_file import PARTIAL_SUFFIX, variant_folder
from moestro.store.variant_manifest import (
    DENSE_NAME,
    PLANES_NAME,
    VARIANT_NAME,
    DeltaPlane,
    DenseDelta,
    VariantManifest,
    encode,
)
from moestro.variants.plan import DELTA_SUFFIX, VariantPlan

_SMALL_FILES = 4 << 20


@dataclass(frozen=True)
class VariantFacts:
    """What a variant's manifest says beside places and checksums; see `VariantManifest`."""

    source: str
    source_name: str
    text: CalibrationText | None = None
    tokens: int = 0
    distilled: int = 0
    warnings: tuple[str, ...] = ()


class VariantWriter:
    """The files of one variant that is being added. Use as a context manager; leaving it without `finish` takes
    everything away again.

    Raises:
        VariantError: the name is taken or is none, or another process adds a variant of this name.
        StoreError: the disk is too small.
        OSError: a file cannot be written.
    """

    def __init__(self, store: Store, name: str, plan: VariantPlan) -> None:
        self._store, self._plan = store, plan
        self._folder = variant_folder(store.path, name)
        self._partial = self._folder.with_name(name + PARTIAL_SUFFIX)
        self._planes: dict[tuple[int, int], int] = {}
        self._dense: dict[str, int] = {}
        refuse_taken(store, name)
        check_free(self._partial, plan.planes_nbytes + plan.dense.nbytes + _SMALL_FILES, f"The variant {name}")
        self._made_parent = not self._folder.parent.exists()
        self._stack = ExitStack()
        try:
            lock = FolderLock(self._partial)
        except StoreError:
            raise VariantError(
                f"Another process is adding a variant named {name} to {store.path}. Wait until it is done, or choose "
                "another name."
            ) from None
        self._stack.callback(lock.close)
        try:
            self._empty()
            self._planes_file = self._open(PLANES_NAME, plan.planes_nbytes)
            self._dense_file = self._open(DENSE_NAME, plan.dense.nbytes)
            write_all(self._dense_file, plan.dense.head, 0)
        except BaseException:
            self._drop()
            raise

    def __enter__(self) -> VariantWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._partial.exists():
            self._drop()
        self._stack.close()

    def write_expert(self, layer: int, expert: int, up: torch.Tensor | None, down: torch.Tensor | None) -> None:
        """Write the plane of an expert: the bytes of its regions. May be called again for the same expert."""
        spec = self._plan.layers[layer]
        assert spec is not None
        plane = torch.zeros(spec.nbytes, dtype=torch.uint8)
        for region, data, at in ((spec.up, up, spec.up_at), (spec.down, down, spec.down_at)):
            assert (region is None) == (data is None), (layer, expert)
            if region is not None and data is not None:
                plane[at : at + region.nbytes] = data
        write_all(self._planes_file, byte_view(plane), self._plan.plane_offset(layer, expert))
        self._planes[layer, expert] = checksum(byte_view(plane))

    def write_delta(self, name: str, data: torch.Tensor) -> None:
        """Write the delta of a dense matrix. May be called again."""
        self._write_dense(name + DELTA_SUFFIX, data)

    def write_replacement(self, name: str, values: torch.Tensor) -> None:
        """Write a tensor in full, in the type that the store has it in. Raises CheckpointError if that is too small."""
        stored = torch.empty(values.shape, dtype=TORCH_DTYPES[self._store.dense[name].dtype])
        cast_into(stored, values, name)
        self._write_dense(name, stored)

    def finish(self, facts: VariantFacts) -> None:
        """Bring everything to the disk and give the folder its name."""
        for descriptor in (self._planes_file, self._dense_file):
            os.fsync(descriptor)
        write_durably(self._partial / VARIANT_NAME, encode(self._manifest(facts)))
        sync_file(self._partial)
        refuse_taken(self._store, self._folder.name)
        os.rename(self._partial, self._folder)
        sync_file(self._folder.parent)

    def _write_dense(self, name: str, values: torch.Tensor) -> None:
        place = next(one for one in self._plan.dense.places if one.spec.name == name)
        data = byte_view(values)
        assert len(data) == place.nbytes, (name, len(data), place.nbytes)
        write_all(self._dense_file, data, place.offset)
        self._dense[name] = checksum(data)

    def _manifest(self, facts: VariantFacts) -> VariantManifest:
        plan, options = self._plan, self._plan.options
        places: Mapping[str, int] = {place.spec.name: place.offset for place in plan.dense.places}
        return VariantManifest(
            base=self._store.manifest.source.fingerprint,
            source=facts.source,
            source_name=facts.source_name,
            method=options.method,
            bits=options.bits,
            dense_bits=options.bits_of_dense,
            salient=0.0 if options.is_low_rank else options.kept_share,
            text=facts.text,
            tokens=facts.tokens,
            distilled=facts.distilled,
            warnings=facts.warnings,
            layers=plan.layers,
            planes_file=FileEntry(PLANES_NAME, plan.planes_nbytes, None),
            planes=tuple(
                DeltaPlane(layer, expert, plan.plane_offset(layer, expert), self._planes[layer, expert])
                for layer, experts in enumerate(plan.experts)
                for expert in experts
            ),
            dense_file=FileEntry(DENSE_NAME, plan.dense.nbytes, checksum(plan.dense.head)),
            deltas={
                name: DenseDelta(region, places[name + DELTA_SUFFIX], self._dense[name + DELTA_SUFFIX])
                for name, region in plan.deltas.items()
            },
            replacements={
                place.spec.name: DenseTensor(
                    place.spec.dtype, place.spec.shape, place.offset, place.nbytes, self._dense[place.spec.name]
                )
                for place in plan.dense.places
                if place.spec.name in plan.replacements
            },
        )

    def _open(self, name: str, nbytes: int) -> int:
        descriptor = os.open(self._partial / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, nbytes)
        return descriptor

    def _empty(self) -> None:
        """Delete what an interrupted command left behind."""
        for entry in self._partial.iterdir():
            entry.unlink()

    def _drop(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._made_parent and not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()


def refuse_taken(store: Store, name: str) -> None:
    """Raise VariantError for a name that a variant of the store has, or that none can have."""
    if variant_folder(store.path, name).exists():
        raise VariantError(
            f"The store {store.path} has a variant named {name} already. Choose another name, or take it out first "
            f"with `moestro variants remove {store.path} {name}`."
        )
