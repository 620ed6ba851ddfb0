"""What a store says about how its codes were found and how far each expert's levels are from the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moestro.store.checksum import to_hex
from moestro.store.fields import Fields

NO_TEXT = "none"
_DIGITS = 6


@dataclass(frozen=True)
class CalibrationText:
    """The text that a pack is calibrated on: the name of its file and the checksum of its bytes."""

    name: str
    checksum: int


@dataclass(frozen=True)
class CalibrationFacts:
    """What calibration found.

    `errors[layer][expert][i]` is the relative squared error of the expert's output at the i-th promised level, over the
    tokens of the text that were routed to it; that of an expert in `unrouted` (layer, expert), or of every expert
    when `text` is None, is the sum of the relative squared errors of its matrices. `sensitivity[layer]` is the mean
    KL divergence per token of the final logits that the layer causes at level 2, divided by the mean of its errors
    at that level (None: not measured).
    """

    text: CalibrationText | None
    tokens: int
    errors: tuple[tuple[tuple[float, ...], ...], ...]
    sensitivity: tuple[float, ...] | None
    unrouted: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]


def rounded(value: float) -> float:
    """`value` as it is written in a manifest: with six digits."""
    return float(f"{value:.{_DIGITS}g}")


def facts_body(facts: CalibrationFacts) -> dict[str, Any]:
    """As written in the manifest."""
    return {
        "source": facts.text.name if facts.text else NO_TEXT,
        "checksum": to_hex(facts.text.checksum) if facts.text else None,
        "tokens": facts.tokens,
        "errors": [[list(levels) for levels in experts] for experts in facts.errors],
        "sensitivity": None if facts.sensitivity is None else list(facts.sensitivity),
        "unrouted": [list(pair) for pair in facts.unrouted],
        "warnings": list(facts.warnings),
    }


def parse_facts(body: Fields) -> CalibrationFacts:
    """Read what `facts_body` wrote. Raises StoreError."""
    name, digits = body.text("source"), body.checksum_or_none("checksum")
    return CalibrationFacts(
        text=None if digits is None else CalibrationText(name, digits),
        tokens=body.size("tokens"),
        errors=body.number_tables("errors"),
        sensitivity=body.numbers_or_none("sensitivity"),
        unrouted=tuple((row.size(0), row.size(1)) for row in body.rows("unrouted", columns=2)),
        warnings=body.texts("warnings"),
    )


def facts_problem(facts: CalibrationFacts, experts: Sequence[int], levels: Sequence[int]) -> str | None:
    """What contradicts a store with so many experts per layer and these promised levels, or None."""
    shape = [[len(row) for row in rows] for rows in facts.errors]
    if shape != [[len(levels)] * count for count in experts]:
        return "its table of errors does not have a number for each layer, expert and level"
    if facts.sensitivity is not None and len(facts.sensitivity) != len(experts):
        return f"it has {len(facts.sensitivity)} sensitivities for {len(experts)} layers"
    if any(layer >= len(experts) or expert >= experts[layer] for layer, expert in facts.unrouted):
        return "it lists an expert without tokens that is not there"
    return None
