"""What a user may ask for: a name, or nats per token that may be lost to fewer bits and left-out experts."""

from __future__ import annotations

import math

from moestro.errors import RequestError

EXACT = "exact"
QUALITIES = {EXACT: 0.0, "high": 0.003, "balanced": 0.02, "fast": 0.06}
"""Budgets of expected divergence from the exact level, in nats per token."""

_MOST = 10.0


def parse_quality(text: str) -> float:
    """The budget in nats per token; 0 means exact. Raises RequestError."""
    if text in QUALITIES:
        return QUALITIES[text]
    try:
        nats = float(text)
    except ValueError:
        nats = math.nan
    if not 0 <= nats <= _MOST:
        raise RequestError(
            f"quality is {text!r}, expected {', '.join(QUALITIES)}, or a number from 0 to {_MOST:g}: the nats that a "
            "token may lose."
        )
    return nats
