"""Predictors of routing, found here by name; "a+b" is the ensemble of those."""

from __future__ import annotations

from collections.abc import Callable

from moestro.errors import RequestError
from moestro.policy.knowledge import check, takes
from moestro.policy.observation import Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.calibration import Calibrated, Reliability
from moestro.policy.predictors.eamc import EamcPredictor
from moestro.policy.predictors.ensemble import Ensemble
from moestro.policy.predictors.gate import Gate, LooksAhead
from moestro.policy.predictors.learned import Learned
from moestro.policy.predictors.popularity import Popularity
from moestro.policy.predictors.previous_layer import PreviousLayer
from moestro.policy.predictors.previous_token import PreviousToken
from moestro.policy.predictors.recency import Recency

PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "popularity": Popularity,
    "recency": Recency,
    "previous-token": PreviousToken,
    "previous-layer": PreviousLayer,
    "eamc": EamcPredictor,
    "gate": Gate,
    "learned": Learned,
}
"""Each takes a Shape and keyword arguments."""

DEFAULT_ENSEMBLE = "popularity+recency+previous-token+previous-layer"
"""Needs nothing but routing. "ensemble+gate" and "ensemble+learned" add what is better where there is any."""
_DEFAULT = DEFAULT_ENSEMBLE.split("+")


def make_predictor(name: str, shape: Shape, **knowledge: object) -> Predictor:
    """A fresh predictor of this name, its probabilities calibrated; "a+b" weighs several, "ensemble" stands
    for the default ones.

    `knowledge` are keyword arguments; in an ensemble each member gets those that it takes. Raises RequestError (a
    ValueError) that lists the names there are, or what is taken or needed.
    """
    names = [each for part in name.split("+") for each in (_DEFAULT if part == "ensemble" else [part])]
    for each in names:
        if each not in PREDICTORS:
            known = ", ".join(sorted([*PREDICTORS, "ensemble"]))
            raise RequestError(f"There is no predictor {each!r}; choose of: {known}; or several, joined by '+'.")
    check(f"predictor {name!r}", [PREDICTORS[each] for each in names], knowledge)
    if len(set(names)) != len(names):
        raise RequestError(f"The predictor {name!r} names a member twice; name each once.")
    members = [_make(each, shape, knowledge) for each in names]
    if len(members) > 1:
        return Ensemble(shape, members)
    # Nets are trained on what calibration would correct, and tell all horizons at once.
    return members[0] if isinstance(members[0], Learned) else Calibrated(shape, members[0])


def _make(name: str, shape: Shape, knowledge: dict[str, object]) -> Predictor:
    factory = PREDICTORS[name]
    return factory(shape, **{key: value for key, value in knowledge.items() if key in takes(factory)})


__all__ = [
    "DEFAULT_ENSEMBLE",
    "PREDICTORS",
    "Calibrated",
    "Ensemble",
    "Gate",
    "LooksAhead",
    "Predictor",
    "Reliability",
    "make_predictor",
]
