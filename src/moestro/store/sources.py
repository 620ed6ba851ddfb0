"""The values of a checkpoint's tensors as a plan wants them: experts one by one, dense tensors whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moestro.store.casting import cast_into, check_finite
from moestro.store.checkpoint import Checkpoint
from moestro.store.conversion import convert
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.key_plan import DenseSource, ExpertSource
from moestro.store.pack_plan import ExpertJob, PackPlan

_CHUNK_BYTES = 16 << 20


class SourceReader:
    """Reads what `plan` names from an open checkpoint.

    Raises:
        CheckpointError: from every method, when a tensor cannot be read or converted.
    """

    def __init__(self, plan: PackPlan, checkpoint: Checkpoint) -> None:
        self._plan, self._checkpoint = plan, checkpoint

    def expert(self, job: ExpertJob) -> dict[str, torch.Tensor]:
        """The parameters of one expert in canonical layout, in the checkpoint's type."""
        return {source.param.name: self._param(source, job.expert) for source in job.sources}

    def finite_expert(self, job: ExpertJob) -> dict[str, torch.Tensor]:
        """The parameters of one expert in canonical layout, contiguous fp32.

        Raises:
            NotFiniteError: names the parameter that holds something else than numbers.
        """
        values = {name: value.float().contiguous() for name, value in self.expert(job).items()}
        for source in job.sources:
            check_finite(values[source.param.name], f"{source.name} of expert {job.expert}")
        return values

    def dense(self, source: DenseSource) -> torch.Tensor:
        """A whole dense tensor, in the checkpoint's type."""
        return convert(self._plan.skeleton, source.group, self._checkpoint.read)[source.result]

    def dense_pieces(self, source: DenseSource, stored_bytes: int) -> Iterator[torch.Tensor]:
        """A dense tensor of `stored_bytes` bytes in runs of rows, where it can be cut, so that memory stays small."""
        if source.group.converter is not None or not source.shape or stored_bytes <= _CHUNK_BYTES:
            yield self.dense(source)
            return
        ((_, key),) = source.group.members
        rows = source.shape[0]
        step = max(1, _CHUNK_BYTES * rows // stored_bytes)
        for start in range(0, rows, step):
            yield self._checkpoint.read_rows(key, start, min(start + step, rows))

    def raw_dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every dense tensor by name, in the type in which a raw store would hold it."""
        for source, dtype in zip(self._plan.dense_sources, self._plan.raw_dense_dtypes, strict=True):
            values = self.dense(source)
            stored = torch.empty(values.shape, dtype=TORCH_DTYPES[dtype])
            cast_into(stored, values, source.name)
            yield source.name, stored

    def _param(self, source: ExpertSource, expert: int) -> torch.Tensor:
        def read(key: str) -> torch.Tensor:
            if source.stacked:
                return self._checkpoint.read_rows(key, expert, expert + 1)
            return self._checkpoint.read(key)

        values = convert(self._plan.skeleton, source.groups[expert], read)[source.name][0]
        return values.t() if source.param.transposed else values
