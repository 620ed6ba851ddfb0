"""`moestro variants add`: from a fine-tune's checkpoint to a variant of a store, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from moestro.config import VariantOptions
from moestro.errors import VariantError
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict
from moestro.store.checkpoint import Checkpoint
from moestro.store.fingerprint import fingerprint
from moestro.store.locate import locate_source
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from moestro.store.variant_file import StoredVariant, open_variant
from moestro.store.workers import in_order, one_torch_thread
from moestro.variants.adapter import AdaptedCheckpoint, is_adapter
from moestro.variants.changes import Roles, find_changes
from moestro.variants.checks import check_config, check_tokenizer
from moestro.variants.distill import distill
from moestro.variants.encode import Codes, Encoder, Files
from moestro.variants.inputs import follow
from moestro.variants.plan import VariantPlan, plan_variant
from moestro.variants.text import VariantText, calibration_text
from moestro.variants.weights import CheckpointWeights, Weights, open_base
from moestro.variants.writer import VariantFacts, VariantWriter, refuse_taken

_STEPS_OF_A_READING = 20
"""About so many steps of distillation take as long as finding all codes."""


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
    """Make the fine-tune in `checkpoint` (or a LoRA adapter in PEFT's format) the variant `name` of the store.

    Memory: an expert or a dense matrix of both models at a time for each worker, and what fits its codes; with a text
    besides what `variants/inputs.py` says, with distillation what `variants/distill.py` says.

    Raises:
        VariantError: the name cannot be taken; `checkpoint` is no fine-tune of the store's base, or that is not found.
        CheckpointError, UnsupportedModelError, StoreError: a checkpoint cannot be read, or the disk is full.
    """
    options = options or VariantOptions()
    refuse_taken(store, name)
    skeleton = _skeleton(store)
    folder = Path(checkpoint).expanduser()
    folder = folder if is_adapter(folder) else locate_source(checkpoint)
    with ExitStack() as stack, one_torch_thread():
        check_tokenizer(store, folder, checkpoint)
        if not is_adapter(folder):
            check_config(store, folder, checkpoint)
        ours = open_base(store, base, skeleton)
        stack.callback(ours.close)
        theirs = CheckpointWeights(_open(folder, ours), skeleton)
        stack.callback(theirs.close)
        _refuse_extra(ours, theirs, checkpoint)
        text = calibration_text(store, options)
        models = _Models(store, skeleton, ours, theirs)
        steps = _Steps(_numbers_bytes(skeleton), options.distill_steps, progress)
        changes = find_changes(
            store, skeleton, ours, theirs, name=checkpoint, progress=partial(steps.add, stage="comparing")
        )
        plan = plan_variant(store, skeleton, changes, Roles.of(skeleton, store.manifest.dtype), options)
        facts = VariantFacts(fingerprint(theirs.checkpoint), _name_of(folder), warnings=text.warnings)
        try:
            _write(models, name, plan, text, facts, steps)
        except OSError as error:
            raise VariantError(
                f"The variant {name} could not be written to {store.path}: {error.strerror or error}. Nothing has "
                "changed there: mend the cause and run the same command again."
            ) from error
    return open_variant(store, name)


def _open(folder: Path, base: Weights) -> Checkpoint:
    """The fine-tune's checkpoint; an adapter's is that of its base with the adapter added."""
    if not is_adapter(folder):
        return Checkpoint(folder)
    if base.checkpoint is None:
        raise VariantError(
            f"{folder} is an adapter, which is added to the checkpoint of its base, and that is not to be found. Give "
            "it with --base."
        )
    return AdaptedCheckpoint(base.checkpoint.folder, folder)


class _Steps:
    """Progress over both readings of the fine-tune, and steps of learning, which count as a share of it each."""

    def __init__(self, nbytes: int, steps: int, progress: Callable[[PackProgress], None] | None) -> None:
        self._step = nbytes // _STEPS_OF_A_READING
        self._done, self._total, self._progress = 0, 2 * nbytes + steps * self._step, progress

    def learned(self, stage: str) -> None:
        """One step more has been done."""
        self.add(self._step, stage)

    def add(self, nbytes: int, stage: str) -> None:
        """So many bytes more have been worked on."""
        self._done += nbytes
        if self._progress:
            self._progress(PackProgress(min(self._done, self._total), self._total, stage))


def _write(
    models: _Models, name: str, plan: VariantPlan, text: VariantText, facts: VariantFacts, steps: _Steps
) -> None:
    options, store = plan.options, models.store
    with VariantWriter(store, name, plan) as writer:
        codes, files = Codes(), Files(models.skeleton, plan, writer)
        sink = codes if options.distill_steps else files
        encoder = Encoder(models.skeleton, plan, models.base, models.tuned, sink, steps.add)
        if text.windows is None or not options.calibrates:
            _without_text(models, plan, encoder)
        else:
            follow(_skeleton(store), models.tuned, list(plan.deltas), text.windows.sequences, encoder)
        encoder.rest_of_dense()
        if text.windows is not None and options.distill_steps:
            distill(models.skeleton, plan, models.base, models.tuned, codes, text.windows.sequences, steps.learned)
            codes.pass_on(files)
        if text.windows is not None and (options.distill_steps or options.calibrates):
            facts = replace(facts, text=text.facts, tokens=text.windows.tokens, distilled=options.distill_steps)
        for one in plan.replacements:
            writer.write_replacement(one, models.tuned.dense(one))
        writer.finish(facts)


def _without_text(models: _Models, plan: VariantPlan, encoder: Encoder) -> None:
    def jobs() -> Iterator[Callable[[], Callable[[], None]]]:
        for layer, experts in enumerate(plan.experts):
            for expert in experts:
                yield partial(encoder.expert, layer, expert, models.tuned.expert(layer, expert), (None, None))

    for hand_on in in_order(jobs()):
        hand_on()


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


def _skeleton(store: Store) -> Skeleton:
    return build_skeleton(config_from_dict(store.config_dict))


def _numbers_bytes(skeleton: Skeleton) -> int:
    """Bytes of all parameters as numbers of 16 bits."""
    dense = sum(torch.Size(shape).numel() for shape, _ in skeleton.dense.values())
    experts = sum(_expert_bytes(skeleton, one.layer) * one.num_experts for one in skeleton.expert_layers)
    return 2 * dense + experts


def _expert_bytes(skeleton: Skeleton, layer: int) -> int:
    return 2 * sum(torch.Size(param.shape).numel() for param in skeleton.expert_layers[layer].params)


def _name_of(folder: Path) -> str:
    return folder.resolve().name or "model"
