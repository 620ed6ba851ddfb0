"""Policies that choose the level of each token and expert, found here by name."""

from __future__ import annotations

from collections.abc import Callable

from moestro.errors import RequestError
from moestro.policy.levels.base import LevelAsk, LevelPolicy, LevelTable
from moestro.policy.levels.fixed import Fixed
from moestro.policy.levels.gate import Gate, check_named
from moestro.policy.levels.learned import Learned
from moestro.policy.levels.ledger import Ledger
from moestro.policy.levels.quality import EXACT, QUALITIES, parse_quality
from moestro.policy.levels.sensitivity import Sensitivity

LEVEL_POLICIES: dict[str, Callable[[LevelTable], LevelPolicy]] = {
    "fixed": Fixed,
    "gate": Gate,
    "learned": Learned,
    "ledger": Ledger,
    "sensitivity": Sensitivity,
}
_MEASURED = ("ledger", "sensitivity")
_NAMED = ("gate", "learned")

BY_NET = "learned"
"""The policy that a bit router decides for, whatever is in memory."""


def choose_level_policy(name: str, *, measured: bool, routed: bool = False, store: str) -> str:
    """The name that `auto` stands for: the ledger where the model's sensitivities were `measured`, else the gate.

    `routed`: whether the store has a bit router.

    Raises:
        RequestError: there is no such policy, or it needs what packing has not measured.
    """
    if name == "auto":
        return "ledger" if measured else "gate"
    if name not in LEVEL_POLICIES:
        raise RequestError(
            f"There is no level policy {name!r}; choose one of: {', '.join(['auto', *sorted(LEVEL_POLICIES)])}."
        )
    if name in _MEASURED and not measured:
        raise RequestError(
            f"The level policy {name!r} needs the layers' sensitivities, which {store} does not have: it was packed "
            "without calibration. Pack the model again without --no-calibration, or use the level policy 'gate'."
        )
    if name == BY_NET and not routed:
        raise RequestError(
            f"The level policy {name!r} needs a bit router, which {store} does not have. Train one with `moestro pack "
            f"MODEL {store} --bit-router`, or use another level policy."
        )
    return name


def budget_of(policy: str, quality: str) -> float:
    """Nats per token that a request of this quality may lose under a level policy, 0 for exact.

    Raises:
        RequestError: there is no such quality, or the policy has no notion of it.
    """
    nats = parse_quality(quality)
    if policy in _NAMED:
        check_named(policy, nats)
    return nats


__all__ = [
    "BY_NET",
    "EXACT",
    "LEVEL_POLICIES",
    "QUALITIES",
    "Ledger",
    "LevelAsk",
    "LevelPolicy",
    "LevelTable",
    "budget_of",
    "choose_level_policy",
    "parse_quality",
]
