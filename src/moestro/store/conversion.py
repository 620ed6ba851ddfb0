"""Running transformers' weight conversions on the tensors of one group of keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moestro.errors import CheckpointError, UnsupportedModelError
from moestro.hf.bridge import WeightConverter
from moestro.hf.skeleton import Skeleton

_ALONG_A_DIMENSION = ("Concatenate", "Chunk", "Interleave")


@dataclass(frozen=True)
class KeyGroup:
    """Keys that are converted together: (source pattern, key) pairs, in the order in which they are collected.

    Without a converter there is one key, and it holds `target` as it is.
    """

    target: str
    converter: WeightConverter | None
    members: tuple[tuple[str, str], ...]


def natural(key: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `experts.10` after `experts.9`."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key))


def convert(skeleton: Skeleton, group: KeyGroup, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the model that a group of keys makes, by full name.

    Raises:
        CheckpointError: the tensors do not fit together.
    """
    if group.converter is None:
        ((_, key),) = group.members
        return {group.target: read(key)}
    converter: Any = group.converter
    for pattern, key in group.members:
        converter.add_tensor(group.target, key, pattern, read(key))
    try:
        results: dict[str, Any] = converter.convert(group.target, model=skeleton.model, config=skeleton.config)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"The keys for {group.target} ({', '.join(key for _, key in group.members[:3])}, ...) cannot be converted: "
            f"{error}. Check that config.json belongs to the checkpoint."
        ) from error
    finally:
        converter.collected_tensors.clear()
        converter.layer_targets.clear()
    return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


def meta_results(skeleton: Skeleton, group: KeyGroup, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `convert` would give, found without reading: `shapes` per source pattern (one shape, or
    a list of shapes where several keys match one pattern)."""
    queues = {pattern: list(found) if isinstance(found, list) else [found] for pattern, found in shapes.items()}
    ordered = {key: queues[pattern].pop(0) for pattern, key in group.members}
    results = convert(skeleton, group, lambda key: torch.empty(ordered[key], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in results.items()}


def check_expertwise(converter: WeightConverter | None, name: str) -> None:
    """Refuse a converter that does not give the same for one expert as for all of them at once.

    Raises:
        UnsupportedModelError: names the operation.
    """
    if converter is None:
        return
    starred = any("*" in pattern for pattern in converter.source_patterns)
    operations: list[Any] = converter.operations
    for position, operation in enumerate(operations):
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            acts_alone = starred and position == 0 and operation.dim == 0
        elif starred and position == 0:
            acts_alone = False
        elif kind == "Transpose":
            acts_alone = operation.dim0 > 0 and operation.dim1 > 0 and not operation.check_dims
        else:
            acts_alone = kind in _ALONG_A_DIMENSION and operation.dim > 0
        if not acts_alone:
            raise UnsupportedModelError(
                f"Packing {name} needs the conversion {operation!r}, which moestro cannot run one expert at a time. "
                "Save the model again with transformers' save_pretrained, or ask for support of this architecture."
            )
