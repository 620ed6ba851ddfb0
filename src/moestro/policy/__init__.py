"""Policies: pure code that turns observations into decisions, found here by name."""

from __future__ import annotations

from collections.abc import Callable

from moestro.errors import RequestError
from moestro.policy.base import Evictable, EvictionPolicy, Need
from moestro.policy.lru import LRU

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy of this name; raises RequestError (a ValueError) that lists the names there are."""
    if name not in POLICIES:
        raise RequestError(f"There is no policy {name!r}; choose one of: {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]()


__all__ = ["LRU", "POLICIES", "Evictable", "EvictionPolicy", "Need", "make_policy"]
