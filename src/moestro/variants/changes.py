"""What of a model a fine-tune changed: found by reading both once, a tensor or an expert at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moestro.errors import VariantError
from moestro.hf.linears import LEAST_OUTPUTS, linear_names, lookup_names
from moestro.hf.skeleton import ExpertLayer, Skeleton
from moestro.store.casting import check_finite, fp32_names
from moestro.store.reader import Store
from moestro.variants.weights import Weights

_MOST_CHANGE = 1.0
"""Square of what a fine-tune may add, relative to the matrices of its base: that of an independent model is near 2."""


@dataclass
class Changes:
    """Which parts differ: `experts[layer]` maps changed experts to the names of their changed parameters."""

    experts: list[dict[int, frozenset[str]]] = field(default_factory=list)
    dense: set[str] = field(default_factory=set)
    _added: float = 0.0
    _there: float = 0.0

    @property
    def is_none(self) -> bool:
        """Whether the fine-tune is its base."""
        return not self.dense and not any(self.experts)

    @property
    def relative(self) -> float:
        """Square of the change of all matrices over the square of the base's."""
        return self._added / self._there if self._there else 0.0

    def weigh(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        """Count a matrix."""
        self._added += float((tuned - base).square().sum(dtype=torch.float64))
        self._there += float(base.square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Roles:
    """How dense tensors of a model are stored in a variant: `matrices` as deltas, everything else in full.

    `bias_of` maps a matrix to the bias of its linear map.
    """

    matrices: frozenset[str]
    bias_of: dict[str, str]

    @classmethod
    def of(cls, skeleton: Skeleton, dtype: str) -> Roles:
        """For a store whose unquantised matrices have this type."""
        names = linear_names(skeleton) | lookup_names(skeleton)
        kept = fp32_names(skeleton, dtype)
        matrices = frozenset(
            name
            for name in names - kept
            if len(skeleton.dense[name][0]) == 2 and skeleton.dense[name][0][0] >= LEAST_OUTPUTS
        )
        biases = {name: f"{name.removesuffix('weight')}bias" for name in matrices if name.endswith(".weight")}
        return cls(matrices, {name: bias for name, bias in biases.items() if bias in skeleton.dense})


def find_changes(
    store: Store,
    skeleton: Skeleton,
    base: Weights,
    tuned: Weights,
    *,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> Changes:
    """Compare all parameters. `progress` is told of the bytes that were compared, as 16-bit numbers.

    Raises:
        VariantError: the models are the same, or nowhere near each other.
        CheckpointError: a tensor cannot be read, or holds NaN or infinities.
    """
    changes, report = Changes(), progress or (lambda _: None)
    for layer in skeleton.expert_layers:
        changes.experts.append(_changed_experts(layer, base, tuned, changes, report))
    for one in skeleton.dense:
        ours, theirs = base.dense(one), tuned.dense(one)
        check_finite(theirs, one)
        if theirs.ndim == 2:
            changes.weigh(ours.float(), theirs.float())
        if not torch.equal(ours.float(), theirs.float()):
            changes.dense.add(one)
        report(2 * theirs.numel())
    if changes.is_none:
        raise VariantError(
            f"{name} is the base of the store {store.path} itself: no tensor differs. Give a fine-tune of it."
        )
    if changes.relative > _MOST_CHANGE:
        raise VariantError(
            f"{name} is no fine-tune of the base of the store {store.path}: its matrices are {changes.relative:.2g} "
            "times the base's own squared size away, as those of a model trained apart. Give a fine-tune of this base."
        )
    return changes


def _changed_experts(
    layer: ExpertLayer, base: Weights, tuned: Weights, changes: Changes, report: Callable[[int], None]
) -> dict[int, frozenset[str]]:
    changed = {}
    for expert in range(layer.num_experts):
        ours, theirs = base.expert(layer.layer, expert), tuned.expert(layer.layer, expert)
        for name, value in theirs.items():
            if value.ndim == 2:
                changes.weigh(ours[name], value)
        differ = frozenset(name for name in theirs if not torch.equal(ours[name], theirs[name]))
        if differ:
            changed[expert] = differ
        report(2 * sum(value.numel() for value in theirs.values()))
    return changed
