"""`moestro variants add`: from a fine-tune's checkpoint to a variant of a store, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moestro.config import VariantOptions
from moestro.errors import VariantError
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict
from moestro.quant.delta_codes import pack_delta
from moestro.store.checkpoint import Checkpoint
from moestro.store.fingerprint import fingerprint
from moestro.store.locate import locate_source
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from moestro.store.variant_file import StoredVariant, open_variant
from moestro.store.workers import in_order, one_torch_thread
from moestro.variants.changes import Roles, find_changes
from moestro.variants.checks import check_config, check_tokenizer
from moestro.variants.encode import encode_delta
from moestro.variants.plan import VariantPlan, matrix_names, plan_variant
from moestro.variants.weights import CheckpointWeights, Weights, open_base
from moestro.variants.writer import VariantFacts, VariantWriter, refuse_taken

_Regions = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class _Models:
    """What is added to what."""

    store: Store
    skeleton: Skeleton
    base: Weights
    tuned: CheckpointWeights


def add_variant(
    store: Store,
    name: str,
    checkpoint: str,
    *,
    base: str = "",
    options: VariantOptions | None = None,
    progress: Callable[[PackProgress], None] | None = None,
) -> StoredVariant:
    """Make the fine-tune in `checkpoint` the variant `name` of the store.

    Memory: an expert or a dense matrix of both models at a time for each worker, and what fits its codes.

    Raises:
        VariantError: the name cannot be taken; `checkpoint` is no fine-tune of the store's base, or that is not found.
        CheckpointError, UnsupportedModelError, StoreError: a checkpoint cannot be read, or the disk is full.
    """
    options = options or VariantOptions()
    refuse_taken(store, name)
    skeleton = build_skeleton(config_from_dict(store.config_dict))
    folder = locate_source(checkpoint)
    with ExitStack() as stack, one_torch_thread():
        check_config(store, folder, checkpoint)
        check_tokenizer(store, folder, checkpoint)
        ours = open_base(store, base, skeleton)
        stack.callback(ours.close)
        theirs = CheckpointWeights(Checkpoint(folder), skeleton)
        stack.callback(theirs.close)
        _refuse_extra(ours, theirs, checkpoint)
        models = _Models(store, skeleton, ours, theirs)
        steps = _Steps(_numbers_bytes(skeleton), progress)
        changes = find_changes(
            store, skeleton, ours, theirs, name=checkpoint, progress=partial(steps.add, stage="comparing")
        )
        plan = plan_variant(store, skeleton, changes, Roles.of(skeleton, store.manifest.dtype), options)
        facts = VariantFacts(fingerprint(theirs.checkpoint), _name_of(folder))
        try:
            _write(models, name, plan, facts, steps)
        except OSError as error:
            raise VariantError(
                f"The variant {name} could not be written to {store.path}: {error.strerror or error}. Nothing has "
                "changed there: mend the cause and run the same command again."
            ) from error
    return open_variant(store, name)


class _Steps:
    """Progress over both readings of the fine-tune."""

    def __init__(self, nbytes: int, progress: Callable[[PackProgress], None] | None) -> None:
        self._done, self._total, self._progress = 0, 2 * nbytes, progress

    def add(self, nbytes: int, *, stage: str) -> None:
        """So many bytes more have been worked on."""
        self._done += nbytes
        if self._progress:
            self._progress(PackProgress(min(self._done, self._total), self._total, stage))


def _write(models: _Models, name: str, plan: VariantPlan, facts: VariantFacts, steps: _Steps) -> None:
    with VariantWriter(models.store, name, plan) as writer:
        for layer, expert, regions in in_order(_expert_jobs(models, plan)):
            writer.write_expert(layer, expert, regions["up"], regions["down"])
            steps.add(_expert_bytes(models.skeleton, layer), stage=f"experts of layer {layer + 1}")
        for name_, region in plan.deltas.items():
            delta_NK = models.tuned.dense(name_).float() - models.base.dense(name_).float()
            bias = plan.bias_of.get(name_)
            bias_N = None if bias is None else models.tuned.dense(bias).float() - models.base.dense(bias).float()
            writer.write_delta(name_, pack_delta(encode_delta(delta_NK, region, bias_N), region))
            steps.add(2 * delta_NK.numel(), stage="dense weights")
        for name_ in plan.replacements:
            writer.write_replacement(name_, models.tuned.dense(name_))
        writer.finish(facts)


def _expert_jobs(models: _Models, plan: VariantPlan) -> Iterator[Callable[[], tuple[int, int, _Regions]]]:
    for layer, experts in enumerate(plan.experts):
        for expert in experts:
            ours, theirs = models.base.expert(layer, expert), models.tuned.expert(layer, expert)
            yield partial(_encode_expert, models.skeleton, plan, layer, expert, ours, theirs)


def _encode_expert(
    skeleton: Skeleton,
    plan: VariantPlan,
    layer: int,
    expert: int,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
) -> tuple[int, int, _Regions]:
    spec = plan.layers[layer]
    assert spec is not None
    found: _Regions = {}
    for role, region, name in zip(
        ("up", "down"), (spec.up, spec.down), matrix_names(skeleton.expert_layers[layer]), strict=True
    ):
        if region is None:
            found[role] = None
            continue
        bias_N = theirs[f"{name}_bias"] - ours[f"{name}_bias"] if region.bias else None
        found[role] = pack_delta(encode_delta(theirs[name] - ours[name], region, bias_N), region)
    return layer, expert, found


def _refuse_extra(ours: Weights, theirs: CheckpointWeights, name: str) -> None:
    """Raise VariantError for tensors that the model has no place for, unless its base has them, too."""
    known = ours.ignored if isinstance(ours, CheckpointWeights) else ()
    extra = [key for key in theirs.ignored if key not in known]
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise VariantError(
            f"{name} has tensors that the model has no place for: {', '.join(extra[:3])}{more}. Expected a fine-tune "
            "with the tensors of its base; merge adapters into the weights, or give the adapter's own folder."
        )


def _numbers_bytes(skeleton: Skeleton) -> int:
    """Bytes of all parameters as numbers of 16 bits."""
    dense = sum(torch.Size(shape).numel() for shape, _ in skeleton.dense.values())
    experts = sum(_expert_bytes(skeleton, one.layer) * one.num_experts for one in skeleton.expert_layers)
    return 2 * dense + experts


def _expert_bytes(skeleton: Skeleton, layer: int) -> int:
    return 2 * sum(torch.Size(param.shape).numel() for param in skeleton.expert_layers[layer].params)


def _name_of(folder: Path) -> str:
    return folder.resolve().name or "model"
