"""Hottest expert bit first (D2MoE, arXiv 2504.15299), with counts that are cumulative.

A queue of planes for every expert, base first; the head that most tokens want is read next. A token that wants many
planes wants those below as well: without that, an expert whose tokens all want its last plane would starve at its base.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from moestro.policy.order.base import ChainLoad


def hebf(loads: Sequence[ChainLoad]) -> list[int]:
    """A chain counts as read with its last plane; among equals the first that was asked for comes first."""
    wanted: dict[int, list[int]] = {}  # by expert: tokens that want each of its planes
    chains: dict[tuple[int, int], list[int]] = {}  # by expert and number of planes
    for position, load in enumerate(loads):
        counts = wanted.setdefault(load.expert, [])
        counts += [0] * (load.planes - len(counts))
        for plane in range(load.planes):
            counts[plane] += load.tokens
        chains.setdefault((load.expert, load.planes), []).append(position)
    first = {expert: number for number, expert in enumerate(wanted)}
    heads = [(-counts[0], first[expert], expert, 0) for expert, counts in wanted.items()]
    heapq.heapify(heads)
    order: list[int] = []
    while heads:
        _, number, expert, plane = heapq.heappop(heads)
        order += chains.get((expert, plane + 1), [])
        if plane + 1 < len(wanted[expert]):
            heapq.heappush(heads, (-wanted[expert][plane + 1], number, expert, plane + 1))
    return order
