"""What makes one store of a checkpoint different from another: what goes into the same folder has the same recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moestro.config import RAW
from moestro.store.checksum import to_hex
from moestro.store.manifest import Manifest


@dataclass(frozen=True)
class Recipe:
    """Which checkpoint, and how it is packed. `text` is the checksum of the calibration text (None: without one)."""

    fingerprint: str
    dtype: str
    encoding: str
    levels: tuple[int, ...]
    exact_level: int
    dense_bits: int
    text: int | None

    def __str__(self) -> str:
        """In words, for messages."""
        source = f"source {self.fingerprint} in {self.dtype}"
        if self.encoding == RAW:
            return f"{source}, raw"
        text = "not calibrated" if self.text is None else f"calibrated on text {to_hex(self.text)}"
        levels = ",".join(map(str, self.levels))
        return f"{source}, {self.encoding} {levels} exact at {self.exact_level}, dense {self.dense_bits} bits, {text}"

    def body(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**asdict(self), "levels": list(self.levels)}


def recipe_of(manifest: Manifest) -> Recipe:
    """How a store was made."""
    facts = manifest.calibration
    return Recipe(
        fingerprint=manifest.source.fingerprint,
        dtype=manifest.dtype,
        encoding=manifest.encoding,
        levels=manifest.levels,
        exact_level=manifest.exact_level,
        dense_bits=manifest.dense_bits,
        text=facts.text.checksum if facts and facts.text else None,
    )
