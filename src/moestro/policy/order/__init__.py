"""Orders of reading within a layer, found here by name."""

from __future__ import annotations

from moestro.errors import RequestError
from moestro.policy.order.arrival import arrival
from moestro.policy.order.base import ChainLoad, LoadOrder
from moestro.policy.order.costs import ComputeCosts
from moestro.policy.order.hebf import hebf
from moestro.policy.order.johnson import johnson

LOAD_ORDERS: dict[str, LoadOrder] = {"arrival": arrival, "hebf": hebf, "johnson": johnson}

AUTO = "hebf"
"""The best measured: docs/benchmarks/io.md."""


def make_load_order(name: str) -> LoadOrder:
    """The order of this name, or the best measured for `auto`. Raises RequestError that lists the names there are."""
    chosen = AUTO if name == "auto" else name
    if chosen not in LOAD_ORDERS:
        raise RequestError(f"There is no order {name!r}; choose one of: {', '.join(['auto', *LOAD_ORDERS])}.")
    return LOAD_ORDERS[chosen]


__all__ = ["AUTO", "LOAD_ORDERS", "ChainLoad", "ComputeCosts", "LoadOrder", "make_load_order"]
