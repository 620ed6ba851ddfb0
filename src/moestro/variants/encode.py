"""The codes of what a fine-tune changed: who makes them, and where they go.

Shapes: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from moestro.config import VariantOptions
from moestro.hf.skeleton import Skeleton
from moestro.quant.delta_codes import DeltaParts, pack_delta, signs_of
from moestro.quant.delta_fit import choose_channels, fit_outputs
from moestro.quant.low_rank import LowRankParts, LowRankRegion, Region, flat_region, low_rank_of, pack_low_rank
from moestro.variants.inputs import Hessians
from moestro.variants.plan import VariantPlan, matrix_names
from moestro.variants.weights import Weights
from moestro.variants.writer import VariantWriter

Parts = DeltaParts | LowRankParts
ExpertParts = dict[str, Parts]
"""By the name of the matrix; those that no expert of the layer changed are left out."""


class Sink(Protocol):
    """Where codes go."""

    def expert(self, layer: int, expert: int, parts: ExpertParts) -> None:
        """Those of an expert."""

    def dense(self, name: str, parts: Parts) -> None:
        """Those of a dense matrix."""


@dataclass
class Codes:
    """A sink that keeps all codes in memory."""

    experts: dict[tuple[int, int], ExpertParts] = field(default_factory=dict)
    matrices: dict[str, Parts] = field(default_factory=dict)

    def expert(self, layer: int, expert: int, parts: ExpertParts) -> None:
        """See `Sink`."""
        self.experts[layer, expert] = parts

    def dense(self, name: str, parts: Parts) -> None:
        """See `Sink`."""
        self.matrices[name] = parts

    def pass_on(self, sink: Sink) -> None:
        """Everything to another sink."""
        for (layer, expert), parts in self.experts.items():
            sink.expert(layer, expert, parts)
        for name, one in self.matrices.items():
            sink.dense(name, one)


@dataclass(frozen=True)
class Files:
    """A sink that writes."""

    skeleton: Skeleton
    plan: VariantPlan
    writer: VariantWriter

    def expert(self, layer: int, expert: int, parts: ExpertParts) -> None:
        """See `Sink`."""
        up, down = (_pack(parts[name], region) if region else None for name, region in self.regions(layer).items())
        self.writer.write_expert(layer, expert, up, down)

    def dense(self, name: str, parts: Parts) -> None:
        """See `Sink`."""
        self.writer.write_delta(name, _pack(parts, self.plan.deltas[name]))

    def regions(self, layer: int) -> dict[str, Region | None]:
        """Of a layer's experts, by the matrix's name."""
        return regions_of(self.skeleton, self.plan, layer)


def regions_of(skeleton: Skeleton, plan: VariantPlan, layer: int) -> dict[str, Region | None]:
    """The regions of a layer's changed experts, by the matrix's name."""
    spec = plan.layers[layer]
    regions = (None, None) if spec is None else (spec.up, spec.down)
    return dict(zip(matrix_names(skeleton.expert_layers[layer]), regions, strict=True))


class Encoder:
    """Makes codes of everything that changed, with Hessians where there are some; a `Taker` of them.

    `report` is told of the bytes of a part, as 16-bit numbers, when its codes have been handed to `sink`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: VariantPlan,
        base: Weights,
        tuned: Weights,
        sink: Sink,
        report: Callable[[int, str], None],
    ) -> None:
        self._skeleton, self._plan, self._base, self._tuned = skeleton, plan, base, tuned
        self._sink, self._report = sink, report
        self._changed = [frozenset(experts) for experts in plan.experts]
        self._dense_left = dict.fromkeys(plan.deltas)

    def expert(self, layer: int, expert: int, tuned: dict[str, torch.Tensor], hessians: Hessians) -> Callable[[], None]:
        """Find the codes of an expert. Handing them on is left to the caller, who does so in order."""
        if expert not in self._changed[layer]:
            return lambda: None
        base = self._base.expert(layer, expert)
        parts = {}
        regions = regions_of(self._skeleton, self._plan, layer)
        for (name, region), hessian_KK in zip(regions.items(), hessians, strict=True):
            if region is not None:
                bias_N = tuned[f"{name}_bias"] - base[f"{name}_bias"] if region.bias else None
                parts[name] = encode_delta(tuned[name] - base[name], region, self._plan.options, hessian_KK, bias_N)

        def hand_on() -> None:
            self._sink.expert(layer, expert, parts)
            self._report(2 * sum(value.numel() for value in tuned.values()), f"experts of layer {layer + 1}")

        return hand_on

    def dense(self, name: str, hessian_KK: torch.Tensor | None) -> None:
        """Find the codes of a dense matrix, unless that was done before, and hand them on."""
        if name not in self._dense_left:
            return
        del self._dense_left[name]
        delta_NK = self._tuned.dense(name).float() - self._base.dense(name).float()
        bias = self._plan.bias_of.get(name)
        bias_N = None if bias is None else self._tuned.dense(bias).float() - self._base.dense(bias).float()
        parts = encode_delta(delta_NK, self._plan.deltas[name], self._plan.options, hessian_KK, bias_N)
        self._sink.dense(name, parts)
        self._report(2 * delta_NK.numel(), "dense weights")

    def rest_of_dense(self) -> None:
        """The dense matrices of which no inputs are known."""
        for name in list(self._dense_left):
            self.dense(name, None)


def flat_parts(parts: Parts) -> DeltaParts:
    """Those of a flat delta."""
    assert isinstance(parts, DeltaParts), parts
    return parts


def _pack(parts: Parts, region: Region) -> torch.Tensor:
    if isinstance(parts, LowRankParts):
        assert isinstance(region, LowRankRegion), region
        return pack_low_rank(parts, region)
    return pack_delta(parts, flat_region(region))


def encode_delta(
    delta_NK: torch.Tensor,
    region: Region,
    options: VariantOptions,
    hessian_KK: torch.Tensor | None,
    bias_N: torch.Tensor | None,
) -> Parts:
    """The codes of one difference, by the method that the options name."""
    if isinstance(region, LowRankRegion):
        return replace(low_rank_of(delta_NK, region), bias_N=bias_N)
    if options.method == "bitdelta":
        return replace(signs_of(delta_NK), bias_N=bias_N)
    kept_C = choose_channels(delta_NK, region.bits, region.salient, hessian_KK)
    return replace(fit_outputs(delta_NK, region.bits, kept_C, hessian_KK), bias_N=bias_N)
