"""Trained nets on disk: one safetensors file, whole or not there."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.numpy

from moestro.errors import TraceError
from moestro.policy.observation import Shape
from moestro.policy.predictors.net import HORIZONS, Nets
from moestro.store.disk import write_durably

NETS_FILE = "foresight.safetensors"
"""Its name in a store."""

MOST_OF_EXPERTS = 0.01

_FORMAT = {"format": "moestro-foresight 1"}
"""One entry: safetensors writes several in any order, and the same nets have to be the same bytes."""
_HORIZONS = {"after": len(HORIZONS), "ahead": 1}


def worth_their_bytes(nets_bytes: int, expert_bytes: int) -> bool:
    """Whether nets are better use of memory than a few more experts of a model whose experts take so much.

    Measured on real routing with half of the experts in memory: what they bring is what 3% more experts would.
    """
    return nets_bytes <= MOST_OF_EXPERTS * expert_bytes


def encode_nets(after: Nets, ahead: Nets) -> bytes:
    """The bytes of a file of both roles' nets."""
    roles = {"after": after, "ahead": ahead}
    arrays = {f"{role}.{name}": array for role, nets in roles.items() for name, array in nets.arrays().items()}
    return safetensors.numpy.save(arrays, metadata=_FORMAT)


def save_nets(path: Path, after: Nets, ahead: Nets) -> None:
    """Write both roles' nets, or leave the file as it was. Raises OSError."""
    write_durably(path, encode_nets(after, ahead))


def load_nets(path: Path, shape: Shape) -> tuple[Nets, Nets]:
    """(after, ahead) for a model of this shape.

    Raises:
        TraceError: the file is missing or damaged, or belongs to a model of another shape.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise TraceError(f"{path} cannot be read as a learned predictor ({error}). Train it again.") from error
    if metadata != _FORMAT:
        raise TraceError(f"{path} says {metadata}, expected {_FORMAT} of a learned predictor. Train it again.")
    roles = {}
    for role, horizons in _HORIZONS.items():
        own = {name.removeprefix(f"{role}."): array for name, array in arrays.items() if name.startswith(f"{role}.")}
        roles[role] = Nets.of(own, shape, horizons=horizons)
    return roles["after"], roles["ahead"]
