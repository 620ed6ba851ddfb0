"""The sizes of all codes learned together, so that the whole model gives the logits of the fine-tune.

BitDelta's recipe (arXiv 2402.10193) with the step of every group, its middle and the values of kept channels in place
of one size per matrix; codes stay what they are. Both models are in memory in fp32, with gradients of one copy: for
models that fit.

Shapes: E experts of a layer (1: a dense matrix), N rows (outputs), K columns (inputs) filled up to whole groups, G
groups of g columns, C kept channels, B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import functional_call
from torch.nn import functional

from moestro.hf.skeleton import ExpertLayer, Skeleton
from moestro.quant.delta import DeltaRegion
from moestro.quant.delta_codes import DeltaParts
from moestro.quant.groups import group_size
from moestro.quant.low_rank import flat_region
from moestro.store.workers import worker_count
from moestro.variants.encode import Codes, flat_parts, regions_of
from moestro.variants.plan import VariantPlan
from moestro.variants.weights import Weights

_RATE = 0.01
"""The highest learning rate, in steps of a code; it comes up over a tenth of the steps and falls along a cosine."""

_SMALL = 4_000_000
"""Models of so few parameters gain nothing from a second thread."""

_WARM_UP = 0.1
_BATCH_TOKENS = 1024
_WINDOW = 256
"""Longest sequence of a batch."""


def distill(
    skeleton: Skeleton,
    plan: VariantPlan,
    base: Weights,
    tuned: Weights,
    codes: Codes,
    sequences: Sequence[Sequence[int]],
    report: Callable[[str], None],
) -> None:
    """Let the sizes of `codes` learn for as many steps as the plan's options say, on windows of `sequences`.

    The mean Kullback-Leibler divergence of the logits from the fine-tune's is what falls.
    """
    state = {name: tuned.dense(name) for name in skeleton.dense}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    matrices = [_dense_matrix(name, plan, base, codes) for name in plan.deltas]
    for layer in skeleton.expert_layers:
        matrices += _add_experts(layer, state, skeleton, plan, base, tuned, codes)
    windows = [one[start : start + _WINDOW] for one in sequences for start in range(0, len(one), _WINDOW)]
    model = skeleton.model
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    before = torch.get_num_threads()
    torch.set_num_threads(worker_count() if sum(one.numel() for one in state.values()) > _SMALL else 1)
    try:
        _learn(model, state, matrices, windows, plan.options.distill_steps, report)
    finally:
        torch.set_num_threads(before)
    for matrix in matrices:
        matrix.hand_back()


def _dense_matrix(name: str, plan: VariantPlan, base: Weights, codes: Codes) -> _Matrix:
    def put(learned: list[DeltaParts]) -> None:
        (codes.matrices[name],) = learned

    values = base.dense(name).float().unsqueeze(0)
    parts = [flat_parts(codes.matrices[name])]
    return _Matrix(name, values, parts, flat_region(plan.deltas[name]), put, one_size=plan.options.is_bitdelta)


def _add_experts(
    layer: ExpertLayer,
    state: dict[str, torch.Tensor],
    skeleton: Skeleton,
    plan: VariantPlan,
    base: Weights,
    tuned: Weights,
    codes: Codes,
) -> list[_Matrix]:
    """Put the fine-tune's experts of a layer into `state`; the matrices that have codes."""
    number, changed = layer.layer, plan.experts[layer.layer]
    theirs = [tuned.expert(number, expert) for expert in range(layer.num_experts)]
    ours = {expert: base.expert(number, expert) for expert in changed}
    matrices = []
    for param in layer.params:
        whole = torch.stack([one[param.name] for one in theirs])
        state[f"{layer.module}.{param.name}"] = whole.transpose(1, 2) if param.transposed else whole
    for name, region in regions_of(skeleton, plan, number).items():
        if region is None:
            continue

        def put(learned: list[DeltaParts], name: str = name) -> None:
            for expert, parts in zip(changed, learned, strict=True):
                codes.experts[number, expert][name] = parts

        parts = [flat_parts(codes.experts[number, expert][name]) for expert in changed]
        values = torch.stack([ours[expert][name] for expert in changed])
        one_size = plan.options.is_bitdelta
        transposed = next(param.transposed for param in layer.params if param.name == name)
        full = f"{layer.module}.{name}"
        matrices.append(
            _Matrix(full, values, parts, flat_region(region), put, one_size, changed, state[full], transposed)
        )
    return matrices


def _learn(
    model: Any,
    state: dict[str, torch.Tensor],
    matrices: Sequence[_Matrix],
    windows: Sequence[Sequence[int]],
    steps: int,
    report: Callable[[str], None],
) -> None:
    optimiser = torch.optim.AdamW(
        [one for matrix in matrices for one in matrix.parameters], lr=_RATE, betas=(0.9, 0.99), weight_decay=0.0
    )
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1, pct_start=_WARM_UP)
    generator = torch.Generator().manual_seed(0)
    queue: list[int] = []
    for step in range(steps):
        taken = 0
        batch = []
        while taken < _BATCH_TOKENS:
            queue = queue or torch.randperm(len(windows), generator=generator).tolist()
            batch.append(windows[queue.pop()])
            taken += len(batch[-1])
        ids_BT, is_real_BT = _padded(batch)
        with torch.no_grad():
            wanted_BTV = functional_call(model, state, (ids_BT,)).logits.log_softmax(-1)
        student = state | {matrix.name: matrix.weight() for matrix in matrices}
        found_BTV = functional_call(model, student, (ids_BT,)).logits.log_softmax(-1)
        loss_BT = (wanted_BTV.exp() * (wanted_BTV - found_BTV)).sum(-1)
        loss = loss_BT[is_real_BT].mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        rates.step()
        report(f"distillation, step {step + 1} of {steps}: {float(loss.detach()):.5f} nats a token")


def _padded(batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], filled up at their ends (which no token before them sees), and which are real."""
    longest = max(map(len, batch))
    ids_BT = torch.zeros((len(batch), longest), dtype=torch.int64)
    is_real_BT = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, one in enumerate(batch):
        ids_BT[row, : len(one)] = torch.tensor(one)
        is_real_BT[row, : len(one)] = True
    return ids_BT, is_real_BT


class _DeltaWeight(torch.autograd.Function):
    """base + middle + scale * position + kept values, [E, N, K]; its gradient is kept by group and channel only."""

    @staticmethod
    def forward(
        ctx: Any,
        scale_ENG: torch.Tensor,
        middle_ENG: torch.Tensor,
        value_ECN: torch.Tensor,
        base_ENK: torch.Tensor,
        doubled_ENK: torch.Tensor,
        kept_EC: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(doubled_ENK, kept_EC)
        shape = (*scale_ENG.shape, -1)
        weight_ENGg = doubled_ENK.view(shape).float() * (scale_ENG / 2).unsqueeze(-1) + middle_ENG.unsqueeze(-1)
        weight_ENK = weight_ENGg.flatten(-2)[..., : base_ENK.shape[-1]] + base_ENK
        return weight_ENK.scatter_add_(-1, _places(kept_EC, weight_ENK), value_ECN.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient_ENK: torch.Tensor) -> Any:
        doubled_ENK, kept_EC = ctx.saved_tensors
        value_ECN = gradient_ENK.gather(-1, _places(kept_EC, gradient_ENK)).transpose(1, 2)
        extra = doubled_ENK.shape[-1] - gradient_ENK.shape[-1]
        group = group_size(gradient_ENK.shape[-1])
        shape = (*doubled_ENK.shape[:2], -1, group)
        gradient_ENGg = functional.pad(gradient_ENK, (0, extra)).view(shape)
        scale_ENG = (doubled_ENK.view(shape).float() * gradient_ENGg).sum(-1) / 2
        return scale_ENG, gradient_ENGg.sum(-1), value_ECN, None, None, None


def _places(kept_EC: torch.Tensor, like_ENK: torch.Tensor) -> torch.Tensor:
    return kept_EC.unsqueeze(1).expand(-1, like_ENK.shape[1], -1)


@dataclass
class _Matrix:
    """The codes of one tensor of the model; `put` takes the learned ones.

    Of experts, `base` and `parts` are those of the `changed` ones, and `whole` is the tensor with all (else None).
    """

    name: str
    base: torch.Tensor
    parts: list[DeltaParts]
    region: DeltaRegion
    put: Callable[[list[DeltaParts]], None]
    one_size: bool
    changed: tuple[int, ...] = ()
    whole: torch.Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        half = 2**self.region.bits - 1
        columns = self.region.columns
        extra = -columns % group_size(columns)
        doubled = [2 * one.code_NK.to(torch.int16) - half for one in self.parts]
        self._doubled_ENK = torch.stack([functional.pad(one, (0, extra)).to(torch.int8) for one in doubled])
        unit_E11 = torch.tensor([one.unit for one in self.parts]).view(-1, 1, 1)
        self._scale_ENG = torch.stack([one.scale_NG.float() for one in self.parts]) * unit_E11
        self._middle_ENG = torch.stack([one.middle_NG.float() for one in self.parts]) * unit_E11
        self._value_ECN = torch.stack([one.value_CN.float() for one in self.parts])
        self._kept_EC = torch.stack([one.kept_C.long() for one in self.parts])
        self._size_E11 = self._scale_ENG.abs().mean((1, 2), keepdim=True)
        shape = self._size_E11.shape if self.one_size else self._scale_ENG.shape
        self._moved = [torch.zeros(shape, requires_grad=True)]
        if not self.one_size:
            self._moved += [torch.zeros_like(one, requires_grad=True) for one in (self._middle_ENG, self._value_ECN)]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is learned: distances from where the sizes began, in the mean step of the matrix."""
        return self._moved

    def weight(self) -> torch.Tensor:
        """The tensor as the model has it, with a gradient."""
        weight_ENK: torch.Tensor = _DeltaWeight.apply(*self._sizes(), self.base, self._doubled_ENK, self._kept_EC)  # type: ignore[no-untyped-call]
        if self.whole is None:
            return weight_ENK[0]
        placed = weight_ENK.transpose(1, 2) if self.transposed else weight_ENK
        return self.whole.index_copy(0, torch.tensor(self.changed), placed)

    def hand_back(self) -> None:
        """Give the learned sizes to whom the codes are of."""
        with torch.no_grad():
            scale_ENG, middle_ENG, value_ECN = self._sizes()
        learned = []
        for one, scale_NG, middle_NG, value_CN in zip(self.parts, scale_ENG, middle_ENG, value_ECN, strict=True):
            learned.append(
                replace(
                    one,
                    scale_NG=(scale_NG / one.unit).half(),
                    middle_NG=(middle_NG / one.unit).half(),
                    value_CN=value_CN.half(),
                )
            )
        self.put(learned)

    def _sizes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale_ENG = self._scale_ENG + self._size_E11 * self._moved[0]
        if self.one_size:
            return scale_ENG, self._middle_ENG, self._value_ECN
        middle_ENG = self._middle_ENG + self._size_E11 * self._moved[1]
        return scale_ENG, middle_ENG, self._value_ECN + self._size_E11 * self._moved[2]
