"""`moestro pack`: from a Hugging Face checkpoint to a store, one expert at a time.

Work happens in `<destination>.partial`. What is finished there is noted in a journal after it is on the disk, so that
the same command continues after any interruption and ends with the same bytes. The manifest comes last, then the folder
gets its name: a folder with the name asked for is always a whole store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.config import PackOptions
from moestro.errors import StoreError
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.assets import asset_paths, copy_assets
from moestro.store.calibration_facts import CalibrationFacts
from moestro.store.casting import CastOverflowError, NotFiniteError
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import checksum
from moestro.store.data_free import DataFree
from moestro.store.disk import FolderLock, allocated_bytes, check_free, sync_file, write_durably
from moestro.store.expert_work import ExpertEncoder, ExpertWork, Findings
from moestro.store.journal import JOURNAL_NAME, UnitRecord, read_header
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
from moestro.store.origin import write_origin
from moestro.store.pack_plan import DENSE_NAME, PLANE_FILE_BYTES, PackPlan, plan_pack
from moestro.store.reader import PARTIAL_SUFFIX, Store
from moestro.store.recipe import recipe_of
from moestro.store.workers import one_torch_thread
from moestro.store.writer import SYNC_BYTES, UnitWriter

SCRATCH_NAME = "scratch"
"""Folder of an unfinished store for what its encoder wants to find again after an interruption."""

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
    options: PackOptions | None = None,
    make_encoder: Callable[[Path, PackOptions], ExpertEncoder] | None = None,
    open_checkpoint: Callable[[Path], Checkpoint] = Checkpoint,
    progress: Callable[[PackProgress], None] | None = None,
    limits: PackLimits | None = None,
) -> Store:
    """Pack the checkpoint folder `source` into a store at `destination`, or return the store that is already there.

    `make_encoder(source, options)` gives who finds the experts' codes. Raw and data-free packs need none;
    `moestro.calibration.pack` calls this with one that calibrates. Memory: a few experts plus the largest tensor that
    is not an expert's and is quantised or converted, besides what the encoder says. Keys of the checkpoint that the
    model does not use are listed in the store's `manifest.source.ignored`.

    Raises:
        CheckpointError: the source is incomplete, damaged, or of a format that is not read.
        UnsupportedModelError: the model is not one that moestro runs.
        StoreError: the destination holds something else, another process writes it, or the disk is full.
    """
    options, limits = options or PackOptions(), limits or PackLimits()
    assert make_encoder or options.is_raw or not options.calibration, "calibration needs moestro.calibration.pack"
    if destination.name.endswith(PARTIAL_SUFFIX):
        raise StoreError(f"{destination} ends in {PARTIAL_SUFFIX}, which marks unfinished stores. Choose another name.")
    skeleton = build_skeleton(load_config(source))
    with open_checkpoint(source) as checkpoint:
        encoder = make_encoder(source, options) if make_encoder else DataFree()
        plan = plan_pack(checkpoint, skeleton, options, text=encoder.text, plane_file_bytes=limits.plane_file_bytes)
        ready = _existing(destination, plan)
        if ready is not None:
            return ready
        try:
            return _Packer(source, destination, plan, checkpoint, encoder, progress, limits).run()
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
        encoder: ExpertEncoder,
        progress: Callable[[PackProgress], None] | None,
        limits: PackLimits,
    ) -> None:
        self._source, self._destination, self._plan, self._checkpoint = source, destination, plan, checkpoint
        self._encoder, self._progress, self._limits = encoder, progress, limits
        self._partial = destination.with_name(destination.name + PARTIAL_SUFFIX)
        self._done, self._total = 0, plan.total_bytes

    def run(self) -> Store:
        assets = sum(path.stat().st_size for path in asset_paths(self._source))
        needed = self._plan.file_bytes + assets + _SMALL_FILES - allocated_bytes(self._partial)
        needed += self._encoder.scratch_bytes(self._plan)
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
                with one_torch_thread():
                    self._write_manifest(*self._write_units())
            shutil.rmtree(self._partial / SCRATCH_NAME, ignore_errors=True)
            (self._partial / JOURNAL_NAME).unlink(missing_ok=True)
            sync_file(self._partial)
            os.rename(self._partial, self._destination)
            sync_file(self._destination.parent)
        except (CastOverflowError, NotFiniteError):
            # Another dtype or another checkpoint has to be taken: what is finished is of no use.
            shutil.rmtree(self._partial)
            raise
        finally:
            lock.close()
        return Store.open(self._destination)

    def _refuse_other_work(self) -> None:
        """Raise StoreError unless the partial folder is empty or of this very pack."""
        here = {entry.name for entry in self._partial.iterdir()}
        if MANIFEST_NAME in here:
            if recipe_of(read_manifest(self._partial)) == self._plan.recipe:
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
            f"{self._partial} is an unfinished store of another source, with other options or of another moestro "
            f"version (asked for: {self._plan.recipe}). "
            "Finish it with the command that began it, or delete that folder and run this command again."
        )

    def _write_units(self) -> tuple[dict[int, UnitRecord], Findings]:
        plan = self._plan
        with UnitWriter(self._partial, plan, self._checkpoint, sync_bytes=self._limits.sync_bytes) as writer:
            self._report(sum(plan.unit_bytes(unit) for unit in writer.done), "dense weights")
            later = frozenset() if plan.options.is_raw else self._encoder.dense_units(plan)
            for unit in range(len(plan.dense_sources)):
                if unit not in writer.done and unit not in later:
                    writer.write_dense(unit)
                    self._report(plan.unit_bytes(unit), "dense weights")
            if plan.options.is_raw:
                self._write_raw(writer)
                findings = Findings()
            else:
                findings = self._encoder.run(ExpertWork(plan, self._partial / SCRATCH_NAME, writer, self._report))
            writer.sync()
            return dict(writer.done), findings

    def _write_raw(self, writer: UnitWriter) -> None:
        for unit in range(len(self._plan.dense_sources), self._plan.units):
            if unit not in writer.done:
                writer.write_raw(unit)
                self._report(self._plan.unit_bytes(unit), "experts")

    def _report(self, more_bytes: int, stage: str) -> None:
        self._done += more_bytes
        if self._progress:
            self._progress(PackProgress(self._done, self._total, stage))

    def _write_manifest(self, done: dict[int, UnitRecord], findings: Findings) -> None:
        assets = copy_assets(self._source, self._partial)
        for name, data in findings.files:
            write_durably(self._partial / name, data)
        manifest = _manifest(self._plan, done, assets, findings)
        for entry in assets:
            sync_file(self._partial / entry.name)
        if not self._checkpoint.origin:
            write_origin(self._partial, self._source)
        write_durably(self._partial / MANIFEST_NAME, encode(manifest))


def _existing(destination: Path, plan: PackPlan) -> Store | None:
    """The whole store at `destination`, None when nothing is there, StoreError when it is something else."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    if not has_manifest(destination):
        raise StoreError(f"{destination} exists and is not a store. Choose another destination, or move it away.")
    store = Store.open(destination)
    recipe = recipe_of(store.manifest)
    if recipe != plan.recipe:
        raise StoreError(
            f"{destination} is a store of another checkpoint or packed otherwise ({recipe}; asked for {plan.recipe}). "
            "Choose another destination, or delete that store."
        )
    return store


def _manifest(
    plan: PackPlan, done: dict[int, UnitRecord], assets: tuple[FileEntry, ...], findings: Findings
) -> Manifest:
    recipe = plan.recipe
    first = min((place.offset for place in plan.dense.places), default=plan.dense.nbytes)
    assert first == len(plan.dense.head)
    return Manifest(
        encoding=recipe.encoding,
        dtype=plan.dtype,
        dense_bits=recipe.dense_bits,
        exact_level=recipe.exact_level,
        levels=plan.levels,
        source=plan.source,
        model=plan.model,
        layouts=plan.layouts,
        layers=plan.layers,
        plane_files=plan.plane_files,
        planes=tuple(_plane_entries(plan, done)),
        dense_file=FileEntry(DENSE_NAME, plan.dense.nbytes, checksum(plan.dense.head)),
        dense=dict(_dense_entries(plan, done)),
        assets=assets,
        calibration=None if plan.options.is_raw else _facts(plan, done, findings),
    )


def _dense_entries(plan: PackPlan, done: dict[int, UnitRecord]) -> Iterator[tuple[str, DenseTensor]]:
    for unit, place in enumerate(plan.dense.places):
        (value,) = done[unit].checksums
        yield place.spec.name, DenseTensor(place.spec.dtype, place.spec.shape, place.offset, place.nbytes, value)


def _plane_entries(plan: PackPlan, done: dict[int, UnitRecord]) -> Iterator[PlaneEntry]:
    for unit, job in enumerate(plan.experts, len(plan.dense_sources)):
        offset = job.offset
        for plane, value in zip(job.layout.planes, done[unit].checksums, strict=True):
            yield PlaneEntry(job.file, offset, value)
            offset += plane.nbytes


def _facts(plan: PackPlan, done: dict[int, UnitRecord], findings: Findings) -> CalibrationFacts:
    return CalibrationFacts(
        text=plan.text,
        tokens=findings.tokens,
        errors=tuple(
            tuple(done[plan.expert_unit(layer, expert)].errors for expert in range(entry.experts))
            for layer, entry in enumerate(plan.layers)
        ),
        sensitivity=findings.sensitivity,
        unrouted=findings.unrouted,
        warnings=findings.warnings,
    )
