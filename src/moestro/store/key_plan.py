"""From a checkpoint's keys to the model's tensors, by transformers' own conversion mapping.

Every expert parameter becomes one `ExpertSource` that can be read expert by expert, every other tensor one
`DenseSource`. Which names are renamed, merged or concatenated is transformers' knowledge (`conversion_mapping`); what
is added here is that its operations run on one expert at a time, and the refusal of operations for which that is not
the same as running them on all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moestro.errors import CheckpointError, UnsupportedModelError
from moestro.hf.bridge import WeightConverter, WeightRenaming, get_model_conversion_mapping, rename_source_key
from moestro.hf.skeleton import ExpertLayer, ExpertParam, Skeleton
from moestro.store.conversion import KeyGroup, check_expertwise, meta_results, natural
from moestro.store.quantised import SourceTensor

_SHOWN = 3


@dataclass(frozen=True)
class ExpertSource:
    """Where one parameter of a layer's experts comes from: the result called `name` of converting a group of keys.

    `groups[e]` are the keys of expert e; where the checkpoint stacks all experts in one tensor, `stacked` is set and
    every expert has the same group.
    """

    name: str
    layer: ExpertLayer
    param: ExpertParam
    groups: tuple[KeyGroup, ...]
    stacked: bool


@dataclass(frozen=True)
class DenseSource:
    """Where a tensor that is not an expert's comes from: the result called `result` of converting `group`."""

    name: str
    shape: tuple[int, ...]
    group: KeyGroup
    result: str
    dtype: str


@dataclass(frozen=True)
class KeyPlan:
    """All tensors of the model. `experts[layer]` has one source per parameter, in the order of the skeleton's."""

    experts: tuple[tuple[ExpertSource, ...], ...]
    dense: tuple[DenseSource, ...]
    ignored: tuple[str, ...]


@dataclass
class _Collected:
    """Keys that go into one target name together, before experts are told apart."""

    target: str
    converter: WeightConverter | None
    members: list[tuple[str, str, str]] = field(default_factory=list)  # (source pattern, renamed key, key)


def plan_keys(skeleton: Skeleton, tensors: Mapping[str, SourceTensor]) -> KeyPlan:
    """Map every tensor of the model to its keys.

    Raises:
        CheckpointError: keys of the model are missing, or a tensor has another shape than the config says.
        UnsupportedModelError: the model's experts need a conversion that cannot be done one expert at a time.
    """
    collected, ignored = _collect(skeleton, tensors)
    expert_names = {f"{layer.module}.{param.name}" for layer in skeleton.expert_layers for param in layer.params}
    dense_groups = {name: group for name, group in collected.items() if name not in expert_names}
    missing: list[str] = []
    experts = tuple(
        tuple(_expert_source(skeleton, layer, param, collected, tensors, missing) for param in layer.params)
        for layer in skeleton.expert_layers
    )
    dense, unused = _dense_sources(skeleton, dense_groups, tensors, missing)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} tensor(s) of the model: {', '.join(missing[:_SHOWN])}{more}. "
            "Download or copy it again, and check that config.json belongs to it."
        )
    return KeyPlan(
        tuple(tuple(source for source in layer if source is not None) for layer in experts),
        tuple(dense),
        tuple(sorted([*ignored, *unused], key=natural)),
    )


def _collect(skeleton: Skeleton, tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, _Collected], list[str]]:
    """Sort keys by target name as transformers does when it loads; and the keys that have none."""
    mapping = get_model_conversion_mapping(skeleton.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state: dict[str, Any] = skeleton.model.state_dict()
    prefix = skeleton.model.base_model_prefix
    collected: dict[str, _Collected] = {}
    ignored = []
    for key in sorted(tensors, key=natural):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            ignored.append(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = collected.setdefault(target, _Collected(target, converter))
        if group.converter is not converter or (converter is None and group.members):
            raise CheckpointError(
                f"The checkpoint's keys {group.members[0][2]} and {key} both stand for {target}. Expected one of them."
            )
        starred = pattern is not None and "*" in pattern
        renamed = rename_source_key(key, renamings, [])[0] if starred else key
        group.members.append((pattern or key, renamed, key))
        if converter is not None:
            for other in converter.target_patterns[1:]:
                collected.setdefault(target.replace(converter.target_patterns[0], other), group)
    return collected, ignored


def _expert_source(
    skeleton: Skeleton,
    layer: ExpertLayer,
    param: ExpertParam,
    collected: Mapping[str, _Collected],
    tensors: Mapping[str, SourceTensor],
    missing: list[str],
) -> ExpertSource | None:
    name = f"{layer.module}.{param.name}"
    group = collected.get(name)
    if group is None:
        missing.append(name)
        return None
    check_expertwise(group.converter, name)
    starred = [pattern for pattern, _, _ in group.members if "*" in pattern]
    if group.converter is None or not starred:
        keys = tuple((pattern, key) for pattern, _, key in group.members)
        groups: tuple[KeyGroup, ...] = (KeyGroup(group.target, group.converter, keys),) * layer.num_experts
    else:
        per_expert = _keys_of_experts(group, layer, missing)
        if per_expert is None:
            return None
        groups = tuple(KeyGroup(group.target, group.converter, keys) for keys in per_expert)
    source = ExpertSource(name, layer, param, groups, stacked=group.converter is None or not starred)
    _check_expert_shapes(skeleton, source, tensors)
    return source


def _keys_of_experts(
    group: _Collected, layer: ExpertLayer, missing: list[str]
) -> list[tuple[tuple[str, str], ...]] | None:
    assert group.converter is not None
    found: dict[tuple[int, str], str] = {}
    for pattern, renamed, key in group.members:
        found[_expert_index(pattern, renamed, group.target), pattern] = key
    known = len(missing)
    for expert in range(layer.num_experts):
        for pattern in group.converter.source_patterns:
            if (expert, pattern) not in found:
                missing.append(f"{layer.module}.{expert} ({pattern})")
    extra = [key for (expert, _), key in found.items() if expert >= layer.num_experts]
    if extra:
        raise CheckpointError(
            f"The checkpoint has tensor {extra[0]}, but the config says that {layer.module} has {layer.num_experts} "
            "experts. Check that config.json belongs to the checkpoint."
        )
    if len(missing) > known:
        return None
    patterns = group.converter.source_patterns
    return [tuple((pattern, found[expert, pattern]) for pattern in patterns) for expert in range(layer.num_experts)]


def _expert_index(pattern: str, renamed: str, target: str) -> int:
    """The number that stands for `*` in a renamed key."""
    match = re.search(pattern.replace("*.", r"(?P<moestro_expert>\d+)\.", 1), renamed)
    if pattern.count("*") != 1 or match is None:
        raise UnsupportedModelError(
            f"The checkpoint's key {renamed} for {target} does not say which expert it is of (pattern {pattern!r}), "
            "so it cannot be packed one expert at a time."
        )
    return int(match["moestro_expert"])


def _check_expert_shapes(skeleton: Skeleton, source: ExpertSource, tensors: Mapping[str, SourceTensor]) -> None:
    """Run the conversion on shapes alone; all experts must be of the first one's shapes."""
    own = source.param.shape[::-1] if source.param.transposed else source.param.shape
    first = source.groups[0]
    shapes = {pattern: tensors[key].shape for pattern, key in first.members}
    for group in source.groups[1:] if not source.stacked else ():
        for pattern, key in group.members:
            if tensors[key].shape != shapes[pattern]:
                raise CheckpointError(_shape_message(key, tensors[key].shape, shapes[pattern]))
    key = first.members[0][1]
    if source.stacked and any(shape[:1] != (source.layer.num_experts,) for shape in shapes.values()):
        raise CheckpointError(_shape_message(key, tensors[key].shape, (source.layer.num_experts, *own)))
    results = meta_results(skeleton, first, {p: (1, *s[1:]) if source.stacked else s for p, s in shapes.items()})
    if results.get(source.name) != (1, *own):
        raise CheckpointError(_shape_message(source.name, results.get(source.name, ())[1:], own))


def _dense_sources(
    skeleton: Skeleton,
    collected: Mapping[str, _Collected],
    tensors: Mapping[str, SourceTensor],
    missing: list[str],
) -> tuple[list[DenseSource], list[str]]:
    produced: dict[str, tuple[KeyGroup, tuple[int, ...]]] = {}
    for found in {id(group): group for group in collected.values()}.values():
        keys = KeyGroup(found.target, found.converter, tuple((pattern, key) for pattern, _, key in found.members))
        shapes = _shapes_by_pattern(keys.members, tensors)
        for name, shape in meta_results(skeleton, keys, shapes).items():
            produced[name] = keys, shape
    sources = []
    used: set[str] = set()
    twins = _tied_names(skeleton)
    for name, (shape, dtype) in skeleton.dense.items():
        result = next((twin for twin in twins.get(name, (name,)) if twin in produced), None)
        if result is None:
            missing.append(name)
            continue
        group, actual = produced[result]
        if actual != shape:
            raise CheckpointError(_shape_message(name, actual, shape))
        used.add(group.target)
        sources.append(DenseSource(name, shape, group, result, _source_dtype(group, tensors, dtype)))
    unused = [key for group, _ in produced.values() if group.target not in used for _, key in group.members]
    return sources, sorted(set(unused))


def _shapes_by_pattern(members: Sequence[tuple[str, str]], tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    """Shapes per source pattern; a list of them where several keys match one pattern."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for pattern, key in members:
        shapes.setdefault(pattern, []).append(tensors[key].shape)
    return {pattern: found[0] if len(found) == 1 else found for pattern, found in shapes.items()}


def _source_dtype(group: KeyGroup, tensors: Mapping[str, SourceTensor], wanted: torch.dtype) -> str:
    dtypes = {tensors[key].dtype for _, key in group.members}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "F32" if wanted.is_floating_point else "I64"


def _tied_names(skeleton: Skeleton) -> dict[str, tuple[str, ...]]:
    """For each dense tensor, its own name first and then the names that are tied to it."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in skeleton.model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return {
        name: (name, *(other for other in names if other != name))
        for names in by_tensor.values()
        for name in names
        if name in skeleton.dense
    }


def _shape_message(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"Tensor {name} has shape {list(actual)}, expected {list(expected)} by the config. "
        "Check that config.json belongs to the checkpoint."
    )
