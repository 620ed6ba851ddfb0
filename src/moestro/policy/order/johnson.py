"""Johnson's rule (1954): the shortest time for jobs that each need one machine, then the other.

The disk is the first machine and the processor the second; what is resident needs no disk and comes before all of
this. The rule is optimal when the jobs are independent: chains of one expert, which share planes, are taken as one
after another.
"""

from __future__ import annotations

from collections.abc import Sequence

from moestro.policy.order.base import ChainLoad


def johnson(loads: Sequence[ChainLoad]) -> list[int]:
    """First those that take no longer to read than to compute, the quickest to read first; then the others, the longest
    to compute first; among equals the first that was asked for.
    """
    return sorted(range(len(loads)), key=lambda position: _rank(loads[position]))


def _rank(load: ChainLoad) -> tuple[bool, float]:
    if load.read_s <= load.compute_s:
        return False, load.read_s
    return True, -load.compute_s
