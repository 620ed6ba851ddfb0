"""A policy and a predictor by name, as they work together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moestro.errors import RequestError, TraceError
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KEEP_POLICIES, KeepPolicy, make_keep_policy
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.keeping.value import Value
from moestro.policy.knowledge import takes
from moestro.policy.observation import Shape
from moestro.policy.predictors import PREDICTORS, Gate, Predictor, make_predictor
from moestro.policy.predictors.net import Nets
from moestro.policy.prefetch import Prefetcher
from moestro.trace.collection import EamCollection

VALUE = "value"
LEARNED = "learned"
ENSEMBLE = "ensemble"
GATE = "gate"
_COLLECTION = "collection"


def policy_names() -> list[str]:
    """Of all policies that can be judged."""
    return sorted([*KEEP_POLICIES, VALUE])


@dataclass(frozen=True)
class Choice:
    """`predictor` is None where nothing needs one; `shared` when the policy drives it. `ahead`: what says which experts
    to read ahead, if not that one."""

    shape: Shape
    policy: KeepPolicy
    predictor: Predictor | None
    shared: bool
    ahead: Predictor | None = None

    def foresight(self, *, prefetch: bool) -> Foresight:
        """What a runtime would be driven by."""
        prefetcher = None
        if prefetch:
            ahead = self.ahead or self.predictor
            assert ahead is not None
            prefetcher = Prefetcher(self.shape, ahead)
        own = self.ahead or (None if self.shared else self.predictor)
        return Foresight(WorthEviction(self.policy, self.shape), prefetcher=prefetcher, own_predictor=own)


def needs_nets(policy: str, predictor: str, *, prefetch: bool) -> bool:
    """Whether the nets of the learned predictor have a part in it."""
    return LEARNED in predictor.split("+") and (policy == VALUE or prefetch)


def needs_gates(ahead: str) -> bool:
    """Whether what the gates of layers to come would choose has a part in what is read ahead."""
    return GATE in ahead.split("+")


def needs_collection(policy: str, predictor: str, *, prefetch: bool) -> bool:
    """Whether it goes by the collection of past requests."""
    return any(_COLLECTION in takes(one) for one in _factories(policy, predictor, prefetch=prefetch))


def _factories(policy: str, predictor: str, *, prefetch: bool) -> list[Callable[..., object]]:
    """What is made of the names; the default ensemble's members need nothing."""
    asked = predictor.split("+") if policy == VALUE or prefetch else []
    made: list[Callable[..., object]] = [PREDICTORS[name] for name in asked if name in PREDICTORS]
    return made if policy == VALUE else [*made, KEEP_POLICIES[policy]]


def make_choice(
    policy: str,
    predictor: str,
    shape: Shape,
    *,
    prefetch: bool,
    nets: tuple[Nets, Nets] | None,
    collection: EamCollection | None = None,
    ahead: str = "",
) -> Choice:
    """By names; `nets` (after, ahead) are those of the learned predictor. `collection`: of past requests, which
    somebody else fills (None: whoever needs one has one of its own). `ahead`: what to read ahead by (empty: by
    `predictor`).

    Raises:
        RequestError: there is no such name.
        TraceError: the learned predictor is asked for and there are no nets.
    """
    own: Predictor | None = None
    if prefetch and ahead not in ("", predictor):
        # What a gate's ranks are worth is counted anyway, so alone it needs no calibration.
        own = Gate(shape) if ahead == GATE else _predictor(ahead, shape, nets, collection)
    foreseen = None
    if policy == VALUE or (prefetch and own is None):
        foreseen = _predictor(predictor, shape, nets, collection)
    if policy == VALUE:
        assert foreseen is not None
        return Choice(shape, Value(shape, predictor=foreseen), foreseen, shared=True, ahead=own)
    given = {} if collection is None or _COLLECTION not in takes(KEEP_POLICIES[policy]) else {_COLLECTION: collection}
    return Choice(shape, make_keep_policy(policy, shape, **given), foreseen, shared=False, ahead=own)


def _predictor(name: str, shape: Shape, nets: tuple[Nets, Nets] | None, collection: EamCollection | None) -> Predictor:
    knowledge: dict[str, object] = {}
    if collection is not None and needs_collection(VALUE, name, prefetch=True):
        knowledge[_COLLECTION] = collection
    if LEARNED in name.split("+"):
        if nets is None:
            raise TraceError("The learned predictor needs requests to learn from: fit it to recorded routing first.")
        knowledge["after"], knowledge["ahead"] = nets
    return make_predictor(name, shape, **knowledge)


def check_names(policy: str, predictor: str, *, more: tuple[str, ...] = ()) -> None:
    """Raises RequestError, which lists the names there are (and `more`), for one that does not exist."""
    policies = [*more, *policy_names()]
    if policy not in policies:
        raise RequestError(f"There is no policy {policy!r}; choose one of: {', '.join(policies)}.")
    known = [*more, *sorted([*PREDICTORS, ENSEMBLE])]
    for one in [predictor] if predictor in more else predictor.split("+"):
        if one not in known or (one in more and one != predictor):
            raise RequestError(f"There is no predictor {one!r}; choose {', '.join(known)} or several, joined by +.")
