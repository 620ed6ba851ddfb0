"""Writing the units of a store one after another, each noted in the journal once it is on the disk."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch

from moestro.store.casting import cast_into
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import RunningChecksum, checksum
from moestro.store.conversion import convert
from moestro.store.dense_file import DensePlace
from moestro.store.disk import sync_file, write_all
from moestro.store.dtypes import TORCH_DTYPES, byte_view
from moestro.store.journal import JOURNAL_NAME, Journal
from moestro.store.key_plan import DenseSource, ExpertSource
from moestro.store.pack_plan import DENSE_NAME, PackPlan, PlaneJob

SYNC_BYTES = 64 << 20
"""So much is written between two syncs: the most that a crash costs."""

_CHUNK_BYTES = 16 << 20


class UnitWriter:
    """The large files of an unfinished store in `folder`, and its journal. Use as a context manager.

    Raises:
        OSError: a file cannot be written.
        CheckpointError: a tensor cannot be read, converted or cast.
    """

    def __init__(self, folder: Path, plan: PackPlan, checkpoint: Checkpoint, *, sync_bytes: int = SYNC_BYTES) -> None:
        self._plan, self._checkpoint, self._sync_bytes = plan, checkpoint, sync_bytes
        self._pending: dict[int, int] = {}
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
    def done(self) -> dict[int, int]:
        """Checksums of the units that are on the disk for good."""
        return self._journal.done

    def write(self, unit: int) -> None:
        """Write one unit."""
        dense = len(self._plan.dense_sources)
        if unit < dense:
            value = self._write_dense(self._plan.dense_sources[unit], self._plan.dense.places[unit])
        else:
            value = self._write_plane(self._plan.planes[unit - dense])
        self._pending[unit] = value
        self._pending_bytes += self._plan.unit_bytes(unit)
        if self._pending_bytes >= self._sync_bytes:
            self.sync()

    def sync(self) -> None:
        """Bring everything to the disk and note it."""
        for descriptor in (self._dense_file, *self._plane_files):
            os.fdatasync(descriptor)
        if self._pending:
            self._journal.add(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _open(self, path: Path, nbytes: int) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size != nbytes:
            # A new file; or somebody took away what the journal says is there.
            self._journal.restart(self._plan.identity())
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, nbytes)
        return descriptor

    def _write_plane(self, job: PlaneJob) -> int:
        (plane,) = job.layout.planes
        if len(self._buffer) != plane.nbytes:
            self._buffer = bytearray(plane.nbytes)
        for source, tensor in zip(job.sources, plane.tensors, strict=True):
            assert source.param.name == tensor.name
            values = self._expert_values(source, job.expert)
            destination = torch.frombuffer(self._buffer, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
            stored = destination.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
            values = values.t() if source.param.transposed else values
            cast_into(stored, values, f"{source.name} of expert {job.expert}")
        write_all(self._plane_files[job.file], self._buffer, job.offset)
        return checksum(self._buffer)

    def _expert_values(self, source: ExpertSource, expert: int) -> torch.Tensor:
        def read(key: str) -> torch.Tensor:
            if source.stacked:
                return self._checkpoint.read_rows(key, expert, expert + 1)
            return self._checkpoint.read(key)

        return convert(self._plan.skeleton, source.groups[expert], read)[source.name][0]

    def _write_dense(self, source: DenseSource, place: DensePlace) -> int:
        if source.group.converter is None and source.shape and place.nbytes > _CHUNK_BYTES:
            return self._stream_dense(source, place)
        values = convert(self._plan.skeleton, source.group, self._checkpoint.read)[source.result]
        data = _stored_bytes(values, place.spec.dtype, source.name)
        write_all(self._dense_file, data, place.offset)
        return checksum(data)

    def _stream_dense(self, source: DenseSource, place: DensePlace) -> int:
        ((_, key),) = source.group.members
        rows = source.shape[0]
        step = max(1, _CHUNK_BYTES * rows // place.nbytes)
        running = RunningChecksum()
        offset = place.offset
        for start in range(0, rows, step):
            values = self._checkpoint.read_rows(key, start, min(start + step, rows))
            data = _stored_bytes(values, place.spec.dtype, source.name)
            write_all(self._dense_file, data, offset)
            running.update(data)
            offset += len(data)
        return running.value


def _stored_bytes(values: torch.Tensor, dtype: str, name: str) -> memoryview:
    stored = torch.empty(values.shape, dtype=TORCH_DTYPES[dtype])
    cast_into(stored, values, name)
    return byte_view(stored)
