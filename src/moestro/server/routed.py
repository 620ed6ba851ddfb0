"""`routed_experts` of a choice: which experts its tokens were routed to."""

from __future__ import annotations

from typing import Any

from moestro.engine.events import Event

ROUTED = "routed_experts"


def routed_json(event: Event) -> dict[str, Any]:
    """What is added to a choice with this event: nothing, but at the end of one that asked for it."""
    return {} if event.routed_experts is None else {ROUTED: event.routed_experts.as_json()}
