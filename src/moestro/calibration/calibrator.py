"""Finding the experts' codes by running the model over a text, one layer at a time.

All sequences go through the original model together (`stream.py`). When they have come to a layer of experts, each
expert gets the rows that are routed to it: they make the Hessians that its matrices are rounded by, and tell how far
its outputs are off at each level. Inside one expert, down_proj is fitted to what gate and up make of the rows at the
same low level, and rows make up for each other's errors, as far as the logits see them (`consequences.py`, a pass of
some tokens through the model and back before anything else). The sequences go on with the original outputs, so that no
layer learns to make up for another's errors. Copies of one short sequence, each with one layer at the lowest level,
show what a layer's errors do to the final logits.

Memory: the dense weights as they are, plus about

    4 R (6 H + 2 K) bytes of activations, R rows of all sequences of H values and K experts each, plus
    (W + 3) x (16 P + 24 M^2 + 8 T (H + 3 I)) bytes of experts under way,

W workers, P parameters of an expert, M its widest input (H or its width I), T rows routed to it. Linear maps of 4 bits
add the Hessians of a layer's. Before that, the dense weights in fp32 and W pieces of text on their way back
(`consequences.py`). Dense layers run one sequence at a time, in which the longest decides. On disk: 4 R H
bytes for each layer until the store is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from moestro.calibration.consequences import kept_metrics, not_numbers
from moestro.calibration.dense import DenseInputs, calibrated_units
from moestro.calibration.expert import ExpertMath, ExpertResult, ExpertRows
from moestro.calibration.layer import LayerBatch
from moestro.calibration.routing import RoutingLog
from moestro.calibration.scratch import LayerScratch
from moestro.calibration.sensitivity import LogitDistance
from moestro.calibration.stream import LayerRows, SequenceStream
from moestro.calibration.text import Windows
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict
from moestro.kernels import make_kernels
from moestro.kernels.base import Kernels
from moestro.quant import NestedEncoding, make_encoding
from moestro.runtime.dense import place_dense
from moestro.runtime.probe import probe
from moestro.store.calibration_facts import CalibrationText, rounded
from moestro.store.expert_work import ExpertWork, Findings
from moestro.store.pack_plan import PackPlan
from moestro.store.workers import in_order, worker_count

_Done = tuple[int, dict[str, torch.Tensor], ExpertResult]


class Calibrator:
    """An `ExpertEncoder` that runs the model over `windows` of `text`."""

    def __init__(self, text: CalibrationText, windows: Windows, *, warnings: tuple[str, ...] = ()) -> None:
        self._text, self._windows, self._warnings = text, windows, warnings

    @property
    def text(self) -> CalibrationText:
        """The text that the windows are of."""
        return self._text

    def scratch_bytes(self, plan: PackPlan) -> int:
        """Outputs of every layer for all sequences, and the metric of its outputs."""
        layers, width = len(plan.layers), int(plan.skeleton.config.hidden_size)
        rows = self._windows.tokens + (layers + 1) * len(self._windows.short) + width
        return layers * rows * 4 * width

    def dense_units(self, plan: PackPlan) -> frozenset[int]:
        """Linear maps of 4 bits."""
        return frozenset(calibrated_units(plan).values())

    def run(self, work: ExpertWork) -> Findings:
        """Write every expert of `work` that has not been written, and the linear maps of 4 bits.

        Raises:
            UnsupportedModelError: the model cannot be run on packed batches.
            CheckpointError: weights are missing or are not numbers.
            PackError: the model's states are not numbers.
        """
        return _Calibration(self._windows, self._warnings, work).run()


@dataclass
class _Calibration:
    """One calibration under way."""

    windows: Windows
    warnings: tuple[str, ...]
    work: ExpertWork
    unrouted: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> Findings:
        plan = self.work.plan
        self.work.say("reading dense weights")
        skeleton = build_skeleton(config_from_dict(plan.model))
        probe(skeleton, rows=2, history=2, logit_rows=1)
        identity = f"{plan.identity()} {self.windows}"
        self._metrics: Sequence[torch.Tensor | None] = [None] * len(plan.layers)
        if plan.options.encoding == NestedEncoding.name:
            self._metrics = kept_metrics(self.work, self.windows.sequences, identity)
        kernels = make_kernels("auto", threads=worker_count())
        dense_units = calibrated_units(plan)
        self._dense = DenseInputs(skeleton.model, dense_units)
        place_dense(skeleton.model, dict(self.work.raw_dense()), kernels)
        self._scratch = LayerScratch(self.work.scratch, identity)
        distance = LogitDistance(len(self.windows.sequences))
        self._routing = RoutingLog(self.windows)
        with torch.inference_mode():
            stream = self._stream(skeleton, kernels)
            self._modules = stream.modules
            stream.run(self._process, distance.add)
            self._write_dense()
            for unit in dense_units.values():
                self.work.write_dense(unit, None)  # what no row has reached
        return Findings(
            tokens=self.windows.tokens,
            sensitivity=tuple(
                rounded(distance.of_layer(layer) / mean if (mean := self._mean_error(layer)) else 0.0)
                for layer in range(len(plan.layers))
            ),
            unrouted=tuple(self.unrouted),
            warnings=self.warnings,
            files=self._routing.files(plan, lambda: self.work.say("learning what experts follow each other")),
        )

    def _stream(self, skeleton: Skeleton, kernels: Kernels) -> SequenceStream:
        count = len(self.windows.sequences)
        copies = 1 + len(self.work.plan.layers)
        sequences = [*self.windows.sequences, *[self.windows.short] * copies]
        return SequenceStream(skeleton, kernels, sequences, frozenset(range(count, count + copies)))

    def _write_dense(self) -> None:
        """Write the linear maps that rows have passed since the last call."""
        for unit, hessian_KK in self._dense.take().items():
            self.work.write_dense(unit, hessian_KK)

    def _process(self, layer: int, rows: list[LayerRows]) -> list[torch.Tensor]:
        plan = self.work.plan
        experts = plan.layers[layer].experts
        self._note_unrouted(layer, rows)
        self._routing.add(rows)
        self._write_dense()
        shapes = [one.hidden_TH.shape for one in rows]
        if all(self.work.errors(layer, expert) is not None for expert in range(experts)):
            kept = self._scratch.load(layer, shapes)
            if kept is not None:
                return kept
        batch = LayerBatch(layer, rows, len(self.windows.sequences))
        if not batch.is_finite:
            raise not_numbers(f"hidden states in MoE layer {layer}")
        self._encode(layer, batch, self._modules[layer])
        outputs = batch.outputs()
        self.work.sync()
        self._scratch.save(layer, outputs)
        return outputs

    def _encode(self, layer: int, batch: LayerBatch, module: nn.Module) -> None:
        """All experts of a layer, a few at a time, taken over in their order."""
        options = self.work.plan.options
        encoding = make_encoding(options.encoding)
        levels = options.promised_levels
        math = ExpertMath(module, encoding, levels, batch.sample, self._metrics[layer])
        for expert, weights, result in in_order(self._jobs(layer, batch, math)):
            batch.add(expert, result)
            if result.encoded is not None:
                self.work.write(layer, expert, weights, result.encoded)

    def _jobs(self, layer: int, batch: LayerBatch, math: ExpertMath) -> Iterator[Callable[[], _Done]]:
        for expert in range(self.work.plan.layers[layer].experts):
            weights = self.work.weights(layer, expert)
            done = self.work.errors(layer, expert) is not None
            regions = self.work.regions(layer, expert) if done else None
            yield partial(_work_on, expert, weights, math, batch.rows_of(expert), regions)

    def _note_unrouted(self, layer: int, rows: list[LayerRows]) -> None:
        own = rows[: len(self.windows.sequences)]
        used = set(torch.cat([one.index_TK.flatten() for one in own]).tolist())
        experts = range(self.work.plan.layers[layer].experts)
        self.unrouted.extend((layer, expert) for expert in experts if expert not in used)

    def _mean_error(self, layer: int) -> float:
        """Mean error of a layer's experts at the lowest level."""
        errors = [self.work.errors(layer, expert) for expert in range(self.work.plan.layers[layer].experts)]
        assert all(error is not None for error in errors)
        return sum(error[0] for error in errors if error) / len(errors)


def _work_on(
    expert: int,
    weights: dict[str, torch.Tensor],
    math: ExpertMath,
    rows: ExpertRows,
    regions: dict[str, dict[int, torch.Tensor]] | None,
) -> _Done:
    return expert, weights, math.work(weights, rows, regions)
