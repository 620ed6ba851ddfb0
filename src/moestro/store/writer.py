"""Writing the units of a store one after another, each noted in the journal once it is on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from moestro.quant.flat import flat_encode
from moestro.store.casting import cast_into, check_finite
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import RunningChecksum, checksum
from moestro.store.dense_file import FLAT_BITS, DensePlace
from moestro.store.disk import sync_file, write_all
from moestro.store.dtypes import TORCH_DTYPES, byte_view
from moestro.store.journal import JOURNAL_NAME, Journal, UnitRecord
from moestro.store.key_plan import DenseSource
from moestro.store.layout import PlaneLayout, TensorLayout
from moestro.store.pack_plan import DENSE_NAME, ExpertJob, PackPlan
from moestro.store.sources import SourceReader

SYNC_BYTES = 64 << 20
"""So much is written between two syncs: the most that a crash costs."""


@dataclass(frozen=True)
class EncodedExpert:
    """An expert's matrices as bytes: `regions[name][level]` for each plane of the chain, and its error at each
    promised level."""

    regions: Mapping[str, Mapping[int, torch.Tensor]]
    errors: tuple[float, ...]


class UnitWriter:
    """The large files of an unfinished store in `folder`, and its journal. Use as a context manager.

    Raises:
        OSError: a file cannot be written.
        CheckpointError: a tensor cannot be read, converted, cast or quantised.
    """

    def __init__(self, folder: Path, plan: PackPlan, checkpoint: Checkpoint, *, sync_bytes: int = SYNC_BYTES) -> None:
        self.source = SourceReader(plan, checkpoint)
        self._plan, self._sync_bytes = plan, sync_bytes
        self._pending: dict[int, UnitRecord] = {}
        self._pending_bytes = 0
        self._buffer = bytearray()
        self._stack = ExitStack()
        try:
            self._journal = Journal(folder / JOURNAL_NAME, plan.identity())
            self._stack.callback(self._journal.close)
            self._dense_file = self._open(folder / DENSE_NAME, plan.dense.nbytes)
            self._plane_files = [self._open(folder / entry.name, entry.nbytes) for entry in plan.plane_files]
            write_all(self._dense_file, plan.dense.head, 0)
            sync_file(folder)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def done(self) -> dict[int, UnitRecord]:
        """The units that are on the disk for good."""
        return self._journal.done

    def write_dense(self, unit: int, hessian_KK: torch.Tensor | None = None) -> None:
        """Write a dense tensor, from the checkpoint; `hessian_KK` is for `flat_encode`."""
        value = self._write_dense(self._plan.dense_sources[unit], self._plan.dense.places[unit], hessian_KK)
        self._note(unit, UnitRecord((value,)))

    def write_dense_pieces(self, unit: int, pieces: Iterable[torch.Tensor]) -> None:
        """Write a dense tensor as the bytes it is stored as, piece after piece."""
        place = self._plan.dense.places[unit]
        running, offset = RunningChecksum(), place.offset
        for piece in pieces:
            data = byte_view(piece)
            write_all(self._dense_file, data, offset)
            running.update(data)
            offset += len(data)
        assert offset == place.offset + place.nbytes, (place.spec.name, offset - place.offset, place.nbytes)
        self._note(unit, UnitRecord((running.value,)))

    def write_raw(self, unit: int) -> None:
        """Write an expert as it is, from the checkpoint."""
        job = self._plan.expert_of(unit)
        values = self.source.expert(job)
        names = {source.param.name: f"{source.name} of expert {job.expert}" for source in job.sources}
        (plane,) = job.layout.planes
        view = self._cleared(job)
        for tensor in plane.tensors:
            cast_into(_place(view, 0, tensor), values[tensor.name], names[tensor.name])
        self._write_planes(unit, job, ())

    def write_encoded(self, unit: int, values: Mapping[str, torch.Tensor], encoded: EncodedExpert) -> None:
        """Write a quantised expert; its vectors are taken from `values`."""
        job = self._plan.expert_of(unit)
        view = self._cleared(job)
        start = 0
        for plane in job.layout.planes:
            for tensor in plane.tensors:
                if tensor.name in encoded.regions:
                    region = encoded.regions[tensor.name][plane.level]
                    assert region.numel() == tensor.nbytes, (tensor.name, plane.level, region.numel(), tensor.nbytes)
                    _place_bytes(view, start, tensor).copy_(region.view(-1))
                else:
                    _place(view, start, tensor).copy_(values[tensor.name])
            start += plane.nbytes
        self._write_planes(unit, job, encoded.errors)

    def read_planes(self, unit: int) -> dict[str, dict[int, torch.Tensor]]:
        """The regions of a quantised expert that has been written. Raises OSError."""
        job = self._plan.expert_of(unit)
        view = torch.frombuffer(
            bytearray(os.pread(self._plane_files[job.file], job.layout.nbytes, job.offset)), dtype=torch.uint8
        )
        regions: dict[str, dict[int, torch.Tensor]] = {}
        start = 0
        for plane in job.layout.planes:
            for tensor in plane.tensors:
                if tensor.group_size is not None:
                    regions.setdefault(tensor.name, {})[plane.level] = _place_bytes(view, start, tensor)
            start += plane.nbytes
        return regions

    def sync(self) -> None:
        """Bring everything to the disk and note it."""
        for descriptor in (self._dense_file, *self._plane_files):
            os.fdatasync(descriptor)
        if self._pending:
            self._journal.add(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _note(self, unit: int, record: UnitRecord) -> None:
        self._pending[unit] = record
        self._pending_bytes += self._plan.unit_bytes(unit)
        if self._pending_bytes >= self._sync_bytes:
            self.sync()

    def _open(self, path: Path, nbytes: int) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size != nbytes:
            # A new file; or somebody took away what the journal says is there.
            self._journal.restart(self._plan.identity())
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, nbytes)
        return descriptor

    def _cleared(self, job: ExpertJob) -> torch.Tensor:
        """The bytes of one expert's chain, zero."""
        if len(self._buffer) != job.layout.nbytes:
            self._buffer = bytearray(job.layout.nbytes)
        return torch.frombuffer(self._buffer, dtype=torch.uint8).zero_()

    def _write_planes(self, unit: int, job: ExpertJob, errors: tuple[float, ...]) -> None:
        write_all(self._plane_files[job.file], self._buffer, job.offset)
        view = memoryview(self._buffer)
        checksums = tuple(checksum(view[start:end]) for start, end in _bounds(job.layout.planes))
        self._note(unit, UnitRecord(checksums, errors))

    def _write_dense(self, source: DenseSource, place: DensePlace, hessian_KK: torch.Tensor | None) -> int:
        if place.spec.dtype in FLAT_BITS:
            return self._write_flat(source, place, hessian_KK)
        running = RunningChecksum()
        offset = place.offset
        for values in self.source.dense_pieces(source, place.nbytes):
            if not self._plan.options.is_raw:
                check_finite(values, source.name)
            data = _stored_bytes(values, place.spec.dtype, source.name)
            write_all(self._dense_file, data, offset)
            running.update(data)
            offset += len(data)
        return running.value

    def _write_flat(self, source: DenseSource, place: DensePlace, hessian_KK: torch.Tensor | None) -> int:
        values = self.source.dense(source).float().contiguous()
        check_finite(values, source.name)
        data = byte_view(flat_encode(values, FLAT_BITS[place.spec.dtype], hessian_KK))
        assert len(data) == place.nbytes, (source.name, len(data), place.nbytes)
        write_all(self._dense_file, data, place.offset)
        return checksum(data)


def _bounds(planes: tuple[PlaneLayout, ...]) -> list[tuple[int, int]]:
    ends = [0]
    for plane in planes:
        ends.append(ends[-1] + plane.nbytes)
    return list(pairwise(ends))


def _place_bytes(chain: torch.Tensor, start: int, tensor: TensorLayout) -> torch.Tensor:
    """The bytes of a tensor in the plane that begins at byte `start` of the chain."""
    first = start + tensor.offset
    return chain[first : first + tensor.nbytes]


def _place(chain: torch.Tensor, start: int, tensor: TensorLayout) -> torch.Tensor:
    """The elements of an unquantised tensor."""
    return _place_bytes(chain, start, tensor).view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def _stored_bytes(values: torch.Tensor, dtype: str, name: str) -> memoryview:
    stored = torch.empty(values.shape, dtype=TORCH_DTYPES[dtype])
    cast_into(stored, values, name)
    return byte_view(stored)
