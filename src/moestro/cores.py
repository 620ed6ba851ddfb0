"""How many cores this process may run on."""

from __future__ import annotations

import os


def available_cores() -> int:
    """At least one; those it is bound to, where the system knows of such."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
