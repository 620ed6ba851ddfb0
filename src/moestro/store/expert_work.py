"""What stands between a pack and whoever finds the codes of its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from moestro.store.calibration_facts import CalibrationText
from moestro.store.pack_plan import PackPlan
from moestro.store.writer import EncodedExpert, UnitWriter


@dataclass(frozen=True)
class Findings:
    """What an encoder learnt beside each expert's errors; fields as in `CalibrationFacts`, and `files` that go into the
    store as they are, by name."""

    tokens: int = 0
    sensitivity: tuple[float, ...] | None = None
    unrouted: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[tuple[str, bytes], ...] = ()


class ExpertEncoder(Protocol):
    """Quantises all experts of a pack."""

    @property
    def text(self) -> CalibrationText | None:
        """The text that it looks at, if any."""

    def scratch_bytes(self, plan: PackPlan) -> int:
        """Bytes of files that it keeps while it runs."""

    def dense_units(self, plan: PackPlan) -> frozenset[int]:
        """The dense tensors that `run` writes, too; the others are written before it."""

    def run(self, work: ExpertWork) -> Findings:
        """Write every expert of `work` that has not been written, and every dense tensor of `dense_units`.

        Ends with the same bytes and findings wherever an earlier run was interrupted.
        """


class WithoutText:
    """What encoders that look at no text have in common."""

    @property
    def text(self) -> CalibrationText | None:
        """None."""
        return None

    def scratch_bytes(self, plan: PackPlan) -> int:
        """None are needed."""
        del plan
        return 0


class ExpertWork:
    """The experts of a pack under way: their original weights, and where their codes go."""

    def __init__(
        self, plan: PackPlan, scratch: Path, writer: UnitWriter, report: Callable[[int, str], None] | None = None
    ) -> None:
        self.plan = plan
        self.scratch = scratch
        """A folder that is kept until the pack is done. It may not exist yet."""
        self._writer, self._report = writer, report or (lambda *_: None)

    def weights(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """An expert's parameters in canonical layout, fp32. Raises CheckpointError, also for NaN and infinities."""
        return self._writer.source.finite_expert(self.plan.expert_of(self.plan.expert_unit(layer, expert)))

    def raw_dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every dense tensor by name, not quantised."""
        return self._writer.source.raw_dense()

    def write_dense(self, unit: int, hessian_KK: torch.Tensor | None) -> None:
        """Write a dense tensor unless it has been written, its codes found with this Hessian of its inputs."""
        if unit not in self._writer.done:
            self._writer.write_dense(unit, hessian_KK)
            self._report(self.plan.unit_bytes(unit), "dense weights")

    def write_dense_pieces(self, unit: int, pieces: Iterable[torch.Tensor]) -> None:
        """Write a dense tensor, unless it has been written, as the bytes it is stored as, piece after piece."""
        if unit not in self._writer.done:
            self._writer.write_dense_pieces(unit, pieces)
            self._report(self.plan.unit_bytes(unit), "dense weights")

    def errors(self, layer: int, expert: int) -> tuple[float, ...] | None:
        """The errors of an expert that is on the disk for good, None for others."""
        record = self._writer.done.get(self.plan.expert_unit(layer, expert))
        return None if record is None else record.errors

    def regions(self, layer: int, expert: int) -> dict[str, dict[int, torch.Tensor]]:
        """The codes of an expert that is on the disk, by matrix and level."""
        return self._writer.read_planes(self.plan.expert_unit(layer, expert))

    def write(self, layer: int, expert: int, weights: Mapping[str, torch.Tensor], encoded: EncodedExpert) -> None:
        """Write an expert's planes. They are on the disk for good some time later, or after `sync`."""
        unit = self.plan.expert_unit(layer, expert)
        self._writer.write_encoded(unit, weights, encoded)
        self._report(self.plan.unit_bytes(unit), f"experts of layer {layer + 1} of {len(self.plan.layers)}")

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        self._writer.sync()

    def say(self, stage: str) -> None:
        """Tell the user what is going on."""
        self._report(0, stage)
