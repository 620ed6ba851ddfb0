"""`moestro pack`: from a Hugging Face checkpoint to a store, one expert at a time.

Work happens in `<destination>.partial`. What is finished there is noted in a journal after it is on the disk, so that
the same command continues after any interruption and ends with the same bytes. The manifest comes last, then the folder
gets its name: a folder with the name asked for is always a whole store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moestro.errors import StoreError
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.assets import asset_paths, copy_assets
from moestro.store.casting import CastOverflowError
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import checksum
from moestro.store.disk import FolderLock, allocated_bytes, check_free, sync_file, write_durably
from moestro.store.journal import JOURNAL_NAME, read_header
from moestro.store.manifest import (
    MANIFEST_NAME,
    DenseTensor,
    FileEntry,
    Manifest,
    PlaneEntry,
    encode,
    has_manifest,
    read_manifest,
)
from moestro.store.pack_plan import DENSE_NAME, PLANE_FILE_BYTES, PackPlan, plan_pack
from moestro.store.reader import PARTIAL_SUFFIX, Store
from moestro.store.writer import SYNC_BYTES, UnitWriter

_SMALL_FILES = 16 << 20
"""Allowance for the manifest and the journal when free disk is checked."""


@dataclass(frozen=True)
class PackProgress:
    """How far a pack is. The first report counts what an earlier run had finished."""

    done_bytes: int
    total_bytes: int
    stage: str


@dataclass(frozen=True)
class PackLimits:
    """Sizes that only tests change."""

    sync_bytes: int = SYNC_BYTES
    plane_file_bytes: int = PLANE_FILE_BYTES


def pack(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    progress: Callable[[PackProgress], None] | None = None,
    limits: PackLimits | None = None,
) -> Store:
    """Pack the checkpoint folder `source` into a store at `destination`, or return the store that is already there.

    Memory: a few experts plus the largest tensor that is not an expert's and needs a conversion. `dtype`: "bfloat16",
    "float16", "float32", or None for the checkpoint's own (bf16 where it is quantised). Keys of the checkpoint that the
    model does not use are listed in the store's `manifest.source.ignored`.

    Raises:
        CheckpointError: the source is incomplete, damaged, or of a format that is not read.
        UnsupportedModelError: the model is not one that moestro runs.
        StoreError: the destination holds something else, another process writes it, or the disk is full.
    """
    limits = limits or PackLimits()
    if destination.name.endswith(PARTIAL_SUFFIX):
        raise StoreError(f"{destination} ends in {PARTIAL_SUFFIX}, which marks unfinished stores. Choose another name.")
    skeleton = build_skeleton(load_config(source))
    with Checkpoint(source) as checkpoint:
        plan = plan_pack(checkpoint, skeleton, dtype, plane_file_bytes=limits.plane_file_bytes)
        ready = _existing(destination, plan)
        if ready is not None:
            return ready
        try:
            return _Packer(source, destination, plan, checkpoint, progress, limits).run()
        except OSError as error:
            raise StoreError(
                f"The store {destination} could not be written: {error.strerror or error}. What is finished is kept: "
                "mend the cause and run the same command again."
            ) from error


class _Packer:
    def __init__(
        self,
        source: Path,
        destination: Path,
        plan: PackPlan,
        checkpoint: Checkpoint,
        progress: Callable[[PackProgress], None] | None,
        limits: PackLimits,
    ) -> None:
        self._source, self._destination, self._plan, self._checkpoint = source, destination, plan, checkpoint
        self._progress, self._limits = progress, limits
        self._partial = destination.with_name(destination.name + PARTIAL_SUFFIX)
        self._total = plan.total_bytes

    def run(self) -> Store:
        assets = sum(path.stat().st_size for path in asset_paths(self._source))
        needed = self._plan.file_bytes + assets + _SMALL_FILES - allocated_bytes(self._partial)
        check_free(self._partial, needed, f"Packing {self._source.name}")
        lock = FolderLock(self._partial)
        try:
            ready = _existing(self._destination, self._plan)
            if ready is not None:
                if not any(self._partial.iterdir()):
                    self._partial.rmdir()
                return ready
            self._refuse_other_work()
            if not has_manifest(self._partial):
                self._write_manifest(self._write_units())
            (self._partial / JOURNAL_NAME).unlink(missing_ok=True)
            sync_file(self._partial)
            os.rename(self._partial, self._destination)
            sync_file(self._destination.parent)
        except CastOverflowError:
            # Another dtype has to be chosen: what is finished in this one is of no use.
            shutil.rmtree(self._partial)
            raise
        finally:
            lock.close()
        return Store.open(self._destination)

    def _refuse_other_work(self) -> None:
        """Raise StoreError unless the partial folder is empty or of this very pack."""
        here = {entry.name for entry in self._partial.iterdir()}
        if MANIFEST_NAME in here:
            if _made_from(read_manifest(self._partial), self._plan):
                return
        elif JOURNAL_NAME in here:
            header = read_header(self._partial / JOURNAL_NAME)
            if header is None or header == self._plan.identity():
                return
        elif not here:
            return
        else:
            raise StoreError(
                f"{self._partial} holds files that are not an unfinished store. "
                "Move them away, or choose another destination."
            )
        raise StoreError(
            f"{self._partial} is an unfinished store of another source, dtype or moestro version. "
            "Finish it with the command that began it, or delete that folder and run this command again."
        )

    def _write_units(self) -> dict[int, int]:
        with UnitWriter(self._partial, self._plan, self._checkpoint, sync_bytes=self._limits.sync_bytes) as writer:
            done = sum(self._plan.unit_bytes(unit) for unit in writer.done)
            self._report(done, 0)
            for unit in range(self._plan.units):
                if unit in writer.done:
                    continue
                writer.write(unit)
                done += self._plan.unit_bytes(unit)
                self._report(done, unit)
            writer.sync()
            return dict(writer.done)

    def _report(self, done: int, unit: int) -> None:
        if self._progress:
            stage = "dense weights" if unit < len(self._plan.dense_sources) else "experts"
            self._progress(PackProgress(done, self._total, stage))

    def _write_manifest(self, checksums: dict[int, int]) -> None:
        assets = copy_assets(self._source, self._partial)
        manifest = _manifest(self._plan, checksums, assets)
        for entry in assets:
            sync_file(self._partial / entry.name)
        write_durably(self._partial / MANIFEST_NAME, encode(manifest))


def _existing(destination: Path, plan: PackPlan) -> Store | None:
    """The whole store at `destination`, None when nothing is there, StoreError when it is something else."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    if not has_manifest(destination):
        raise StoreError(f"{destination} exists and is not a store. Choose another destination, or move it away.")
    store = Store.open(destination)
    if not _made_from(store.manifest, plan):
        raise StoreError(
            f"{destination} is a store of another checkpoint or dtype (source {store.manifest.source.fingerprint} in "
            f"{store.manifest.dtype}; asked for {plan.source.fingerprint} in {plan.dtype}). "
            "Choose another destination, or delete that store."
        )
    return store


def _made_from(manifest: Manifest, plan: PackPlan) -> bool:
    return (manifest.source.fingerprint, manifest.dtype) == (plan.source.fingerprint, plan.dtype)


def _manifest(plan: PackPlan, checksums: dict[int, int], assets: tuple[FileEntry, ...]) -> Manifest:
    dense = {}
    for unit, place in enumerate(plan.dense.places):
        spec = place.spec
        dense[spec.name] = DenseTensor(spec.dtype, spec.shape, place.offset, place.nbytes, checksums[unit])
    first_plane = len(plan.dense.places)
    levels = sorted({plane.level for layout in plan.layouts for plane in layout.planes})
    first = min((place.offset for place in plan.dense.places), default=plan.dense.nbytes)
    assert first == len(plan.dense.head)
    return Manifest(
        dtype=plan.dtype,
        exact_level=levels[-1],
        levels=tuple(levels),
        source=plan.source,
        model=plan.model,
        layouts=plan.layouts,
        layers=plan.layers,
        plane_files=plan.plane_files,
        planes=tuple(
            PlaneEntry(job.file, job.offset, checksums[first_plane + index]) for index, job in enumerate(plan.planes)
        ),
        dense_file=FileEntry(DENSE_NAME, plan.dense.nbytes, checksum(plan.dense.head)),
        dense=dense,
        assets=assets,
    )
