"""One noun again: a model may be named with one of its variants, as MODEL:VARIANT."""

from __future__ import annotations

from pathlib import Path


def split_variant(model: str) -> tuple[str, str]:
    """The model and the variant that a name means, an empty one for none. A folder of that very name is a model."""
    base, colon, variant = model.rpartition(":")
    if not colon or not base or "/" in variant or Path(model).expanduser().exists():
        return model, ""
    return base, variant
