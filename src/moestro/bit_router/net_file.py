"""A bit router on disk: one safetensors file, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from moestro.bit_router.net import BitRouter, array_shapes
from moestro.errors import StoreError
from moestro.policy.levels.quality import EXACT, QUALITIES
from moestro.store.checksum import checksum
from moestro.store.disk import write_durably

BIT_ROUTER_FILE = "bit_router.safetensors"
"""Its name in a store."""

_FORMAT = "moestro-bit-router 1"
_AGAIN = "Delete it and train it again with `moestro pack MODEL STORE --bit-router`."


def stored_bit_router_bytes(store: Path) -> int:
    """Size of the bit router in a store, 0 where there is none."""
    file = store / BIT_ROUTER_FILE
    return file.stat().st_size if file.exists() else 0


def encode_bit_router(router: BitRouter) -> bytes:
    """The bytes of a router's file."""
    facts = {
        "format": _FORMAT,
        "levels": list(router.levels),
        "prices": dict(router.prices),
        "checksum": _checksum(router.arrays()),
    }
    # One entry: safetensors writes several in any order, and the same router has to be the same bytes.
    return safetensors.numpy.save(router.arrays(), metadata={"moestro": json.dumps(facts, sort_keys=True)})


def save_bit_router(path: Path, router: BitRouter) -> None:
    """Write a router, or leave the file as it was. Raises OSError."""
    write_durably(path, encode_bit_router(router))


def load_bit_router(path: Path, *, layers: int, hidden: int, experts: int, levels: tuple[int, ...]) -> BitRouter:
    """The router of a model of this shape, with these `levels` up to the exact one.

    Raises:
        StoreError: the file is missing or damaged, or belongs to a model of another shape.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("moestro", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise StoreError(f"{path} cannot be read as a bit router ({error}). {_AGAIN}") from error
    problem = _problem(facts, arrays)
    if problem:
        raise StoreError(f"{path} {problem}. {_AGAIN}")
    width = arrays["inner_bias"].shape[-1] if "inner_bias" in arrays else 0
    wanted = array_shapes(layers=layers, width=width, hidden=hidden, experts=experts, levels=len(levels))
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted or tuple(facts["levels"]) != levels:
        raise StoreError(
            f"{path} is of another model: it has levels {facts['levels']} and arrays {found}, expected levels "
            f"{list(levels)} and arrays {wanted}. {_AGAIN}"
        )
    return BitRouter(
        arrays["inner"], arrays["inner_bias"], arrays["outer"], arrays["outer_bias"], levels, dict(facts["prices"])
    )


def _problem(facts: Any, arrays: dict[str, np.ndarray]) -> str:
    """What is wrong with a file, empty for nothing."""
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        return f"is not a bit router: expected the format {_FORMAT!r}"
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays.values()):
        return "holds weights that are not fp32 numbers"
    if facts.get("checksum") != _checksum(arrays):
        return "is damaged: its weights do not match their checksum"
    prices = facts.get("prices")
    if not isinstance(prices, dict) or set(prices) != set(QUALITIES) - {EXACT}:
        return f"has prices {prices!r}, expected those of {', '.join(sorted(set(QUALITIES) - {EXACT}))}"
    if not all(isinstance(price, float) and 0 < price < float("inf") for price in prices.values()):
        return f"has prices {prices!r}, expected positive numbers"
    return ""


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return f"{checksum(b''.join(arrays[name].tobytes() for name in sorted(arrays))):016x}"
