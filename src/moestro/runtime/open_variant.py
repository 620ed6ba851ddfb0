"""A variant whose files are open: what requests that run on it hold on to.

Shapes: L MoE layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch

from moestro.errors import VariantError
from moestro.kernels.base import ExpertDeltaSpec
from moestro.kernels.low_rank import low_rank_scratch_bytes
from moestro.keys import PlaneExtent
from moestro.memory.direct import FileReader
from moestro.quant.low_rank import LowRankRegion
from moestro.runtime.batch import STEP_ROWS
from moestro.runtime.variant_parts import DenseParts, parts_bytes
from moestro.store.variant_file import StoredVariant

_PLANE_BYTES = 640
"""What Python keeps of a delta plane: a row of the manifest, and where it is (580 bytes measured)."""


class OpenVariant:
    """Its files stay what they are, also when it is removed or another gets its name.

    Attributes:
        name: may be that of another by now.
        serial: no other has it, ever.
        stored: what is in it.
        slot: the number by which steps and planes know it; None while it has none.
        parts: its dense parts, None while they are not in memory.
        changed: what the model meets in the place of its own tensors, by the id of these; empty without parts.
        running: requests that run on it.
        used: when it was used last, in requests begun.
    """

    def __init__(self, stored: StoredVariant, serial: int, reader: FileReader) -> None:
        """Raises VariantError when a file cannot be opened."""
        self.name, self.serial, self.stored = stored.name, serial, stored
        self.slot: int | None = None
        self.parts: DenseParts | None = None
        self.changed: Mapping[int, torch.Tensor] = {}
        self.running = 0
        self.used = 0
        self._reader = reader
        try:
            self._planes, self._dense = reader.keep(stored.planes_file), reader.keep(stored.dense_file)
        except OSError as error:
            raise VariantError(
                f"The variant {stored.name} cannot be opened: {error}. It may just have been removed; otherwise check "
                "the disk."
            ) from error
        weakref.finalize(self, _let_go, reader, self._planes, self._dense)
        self._specs = tuple(
            ExpertDeltaSpec(layer.up, layer.down, layer.up_at, layer.down_at)
            for layer in map(stored.expert_spec, range(len(stored.manifest.layers)))
        )

    def spec(self, layer: int, expert: int) -> ExpertDeltaSpec | None:
        """What is in the delta plane of an expert; None: it has none, because the expert did not change."""
        return None if self.stored.plane(layer, expert) is None else self._specs[layer]

    def plane(self, layer: int, expert: int) -> PlaneExtent:
        """Where the delta plane of an expert lies, which has one."""
        extent = self.stored.plane(layer, expert)
        assert extent is not None, (self.name, layer, expert)
        return replace(extent, file=self._planes)

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """Of each MoE layer, the bytes of a delta plane; 0 where experts did not change."""
        return tuple(self.stored.expert_spec(layer).nbytes for layer in range(len(self._specs)))

    @property
    def memory_bytes(self) -> int:
        """What it takes while it is in memory, planes of experts left out."""
        return parts_bytes(self.stored) + _PLANE_BYTES * len(self.stored.manifest.planes) + self._scratch_bytes

    @cached_property
    def _scratch_bytes(self) -> int:
        """What kernels take to decode products of thin matrices; nothing for flat deltas."""
        manifest = self.stored.manifest
        regions = {one.region for one in manifest.deltas.values()}
        regions |= {region for layer in manifest.layers if layer for region in (layer.up, layer.down) if region}
        low_rank = [region for region in regions if isinstance(region, LowRankRegion)]
        return max((low_rank_scratch_bytes(region, STEP_ROWS) for region in low_rank), default=0)

    def load(self) -> DenseParts:
        """Read the dense parts. Raises PlaneReadError."""
        return DenseParts(self.stored, self._dense, self._reader)


def _let_go(reader: FileReader, *files: object) -> None:
    for file in files:
        reader.let_go(file)  # type: ignore[arg-type]
