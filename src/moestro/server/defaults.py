"""How tokens are picked where a request does not say: as the model's authors say, else as OpenAI does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import StoreError

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Defaults:
    """Values of `SamplingParams` for requests that leave them out."""

    values: dict[str, Any]


def read_defaults(store: Path) -> Defaults:
    """Those of the store's generation_config.json; temperature 1 where it has none.

    A model whose authors say `do_sample: false` picks the likeliest token. Raises StoreError when the file is damaged.
    """
    path = store / "generation_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = {name: settings[name] for name in _FIELDS if settings.get(name) is not None}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{path} cannot be read as a JSON object ({error}). Pack the store again.") from error
    if settings.get("do_sample") is False:
        found["temperature"] = 0.0
    return Defaults({"temperature": 1.0} | {name: _number(value, path) for name, value in found.items()})


def _number(value: Any, path: Path) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StoreError(f"{path} has {value!r} where a number was expected. Mend it.")
    return value
