"""What the matrices of a fine-tune meet: it is run over a text, layer after layer, and inputs become Hessians.

All sequences come to a layer of experts together (`calibration/stream.py`) and go on with the fine-tune's own outputs.
Memory: its dense weights, 4 R (6 H + 2 K) bytes for R rows of H values and K experts each, the Hessians of one layer's
dense matrices, and an expert for each worker.

Shapes: T rows of one sequence or routed to one expert, R of all sequences, H hidden, I expert width, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from moestro.calibration.dense import DenseInputs
from moestro.calibration.expert import mixed_hessian, spread_rows
from moestro.calibration.layer import SAMPLE_ROWS
from moestro.calibration.stream import LayerRows, SequenceStream
from moestro.errors import VariantError
from moestro.hf.skeleton import Skeleton
from moestro.kernels import make_kernels
from moestro.kernels.base import Kernels
from moestro.runtime.dense import place_dense
from moestro.runtime.probe import probe
from moestro.store.workers import in_order, worker_count
from moestro.variants.plan import matrix_names

_PLENTY = 4
"""With so many rows for each input, the expert's own are enough."""

Hessians = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of the inputs of an expert's two projections."""


class Tuned(Protocol):
    """The fine-tune's parameters."""

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Of one expert, fp32 in canonical layout."""

    def dense_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that is not an expert's, not quantised."""


class Taker(Protocol):
    """Who makes codes with the Hessians."""

    def expert(self, layer: int, expert: int, tuned: dict[str, torch.Tensor], hessians: Hessians) -> Callable[[], None]:
        """Make the codes of an expert, on some worker; what this returns is called afterwards, in order."""

    def dense(self, name: str, hessian_KK: torch.Tensor) -> None:
        """Make the codes of a dense matrix."""


def follow(
    skeleton: Skeleton, tuned: Tuned, matrices: Sequence[str], sequences: Sequence[Sequence[int]], taker: Taker
) -> None:
    """Run `sequences` of token ids through the fine-tune, whose `skeleton` is used up; `matrices` are the dense ones
    whose inputs are wanted. Those that no row reaches are not handed to the taker.

    Raises:
        UnsupportedModelError: the model cannot be run on packed batches.
        VariantError: its states are not numbers.
        CheckpointError: weights cannot be read.
    """
    probe(skeleton, rows=2, history=2, logit_rows=1)
    kernels = make_kernels("auto", threads=worker_count())
    names = dict(enumerate(matrices))
    inputs = DenseInputs(skeleton.model, {name: unit for unit, name in names.items()})
    place_dense(skeleton.model, dict(tuned.dense_tensors()), kernels)
    with torch.inference_mode():
        stream = SequenceStream(skeleton, kernels, sequences, frozenset(range(len(sequences))))
        run = _Run(skeleton, tuned, kernels, stream.modules, inputs, names, taker)
        stream.run(run.layer, lambda *_: None)
        run.take_dense()


@dataclass(frozen=True)
class _Run:
    skeleton: Skeleton
    tuned: Tuned
    kernels: Kernels
    modules: tuple[nn.Module, ...]
    inputs: DenseInputs
    names: Mapping[int, str]
    taker: Taker

    def layer(self, layer: int, rows: list[LayerRows]) -> list[torch.Tensor]:
        """All experts of a layer; their combined outputs, by sequence."""
        self.take_dense()
        hidden_RH = torch.cat([one.hidden_TH for one in rows]).float()
        if not bool(hidden_RH.isfinite().all()):
            raise VariantError(
                f"The fine-tune's hidden states in MoE layer {layer} are not numbers: fp32 cannot hold them, or the "
                "checkpoint is damaged. Download or copy it again, or add it with --no-calibration."
            )
        index_RK = torch.cat([one.index_TK for one in rows])
        weights_RK = torch.cat([one.weights_TK for one in rows])
        output_RH = torch.zeros_like(hidden_RH)
        math = _ExpertMath(self.kernels, self.modules[layer], matrix_names(self.skeleton.expert_layers[layer]))
        sample_SH = spread_rows(hidden_RH, SAMPLE_ROWS)

        def jobs() -> Iterator[Callable[[], tuple[torch.Tensor, torch.Tensor, Callable[[], None]]]]:
            for expert in range(self.skeleton.expert_layers[layer].num_experts):
                places_T, choices_T = (index_RK == expert).nonzero(as_tuple=True)
                part = _Part(places_T, hidden_RH[places_T], weights_RK[places_T, choices_T], sample_SH)
                yield partial(self._expert, layer, expert, math, part, self.tuned.expert(layer, expert))

        for places_T, weighted_TH, write in in_order(jobs()):
            output_RH[places_T] += weighted_TH
            write()
        return list(torch.split(output_RH, [len(one.hidden_TH) for one in rows]))

    def take_dense(self) -> None:
        """Hand over the Hessians of dense matrices that rows have passed since the last call."""
        for unit, hessian_KK in self.inputs.take().items():
            self.taker.dense(self.names[unit], hessian_KK)

    def _expert(
        self, layer: int, expert: int, math: _ExpertMath, part: _Part, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        with torch.inference_mode():
            activated_TI = math.activated(weights, part.hidden_TH)
            weighted_TH = math.output(weights, activated_TI) * part.weights_T.unsqueeze(1)
            hessians = math.hessians(weights, part, activated_TI)
            return part.places_T, weighted_TH, self.taker.expert(layer, expert, weights, hessians)


@dataclass(frozen=True)
class _Part:
    """Rows that are routed to an expert, and some of the whole layer."""

    places_T: torch.Tensor
    hidden_TH: torch.Tensor
    weights_T: torch.Tensor
    sample_SH: torch.Tensor


class _ExpertMath:
    """What an expert of a layer computes."""

    def __init__(self, kernels: Kernels, module: nn.Module, names: tuple[str, str]) -> None:
        self._kernels, self._names = kernels, names
        self._experts: Any = module

    def activated(self, weights: Mapping[str, torch.Tensor], hidden_TH: torch.Tensor) -> torch.Tensor:
        """The inputs of the second projection."""
        up = self._names[0]
        up_TG = self._kernels.linear(hidden_TH.contiguous(), weights[up], weights.get(f"{up}_bias"))
        function = self._experts._apply_gate if self._experts.has_gate else self._experts.act_fn
        activated_TI: torch.Tensor = function(up_TG)
        return activated_TI.contiguous()

    def output(self, weights: Mapping[str, torch.Tensor], activated_TI: torch.Tensor) -> torch.Tensor:
        """The output of the second projection."""
        down = self._names[1]
        return self._kernels.linear(activated_TI, weights[down], weights.get(f"{down}_bias"))

    def hessians(self, weights: Mapping[str, torch.Tensor], part: _Part, activated_TI: torch.Tensor) -> Hessians:
        """Those of the expert's own rows, with the layer's as a prior where they are few."""
        inputs = (part.hidden_TH, activated_TI)
        few = [len(rows_TK) < _PLENTY * rows_TK.shape[1] for rows_TK in inputs]
        samples = (
            part.sample_SH if few[0] else None,
            self.activated(weights, part.sample_SH) if few[1] else None,
        )
        up, down = (mixed_hessian(x, part.weights_T, sample) for x, sample in zip(inputs, samples, strict=True))
        return up, down
