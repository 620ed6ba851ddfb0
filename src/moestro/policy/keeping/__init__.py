"""Policies that keep experts by their worth, found here by name."""

from __future__ import annotations

from collections.abc import Callable

from moestro.errors import RequestError
from moestro.policy.keeping.adapmoe import AdapMoE
from moestro.policy.keeping.base import KeepPolicy
from moestro.policy.keeping.edgemoe import EdgeMoE
from moestro.policy.keeping.emoe import EMoE
from moestro.policy.keeping.finemoe import FineMoE
from moestro.policy.keeping.hobbit import Hobbit
from moestro.policy.keeping.lfu import LFU
from moestro.policy.keeping.lrfu import LRFU
from moestro.policy.keeping.lru import LRU
from moestro.policy.keeping.moe_infinity import MoEInfinity
from moestro.policy.knowledge import check
from moestro.policy.observation import Shape

KEEP_POLICIES: dict[str, Callable[..., KeepPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "lrfu": LRFU,
    "moe_infinity": MoEInfinity,
    "hobbit": Hobbit,
    "finemoe": FineMoE,
    "adapmoe": AdapMoE,
    "edgemoe": EdgeMoE,
    "emoe": EMoE,
}


def make_keep_policy(name: str, shape: Shape, **knowledge: object) -> KeepPolicy:
    """A fresh policy of this name; `knowledge` are keyword arguments of its class.

    Raises RequestError (a ValueError) that lists the names there are, or what the policy takes or needs.
    """
    if name not in KEEP_POLICIES:
        raise RequestError(f"There is no keep policy {name!r}; choose one of: {', '.join(sorted(KEEP_POLICIES))}.")
    factory = KEEP_POLICIES[name]
    check(f"keep policy {name!r}", [factory], knowledge)
    return factory(shape, **knowledge)


__all__ = ["KEEP_POLICIES", "KeepPolicy", "make_keep_policy"]
