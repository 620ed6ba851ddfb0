"""Least frequently used: what the published code of MoE-Infinity runs (its paper says otherwise: `moe_infinity.py`)."""

from __future__ import annotations

from moestro.policy.keeping.keeper import Keeper, shares
from moestro.policy.observation import Routing


class LFU(Keeper):
    """Worth is the number of visits that used the expert since the start; a prompt's count in part (see `shares`)."""

    proportional = True

    def observe(self, routing: Routing, /) -> None:
        """O(K)."""
        ids_U, share = shares(routing)
        self._worth_LE[routing.layer, ids_U] += share
