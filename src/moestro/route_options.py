"""Options of the router of domains; users import them from `moestro.config`."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.errors import RouteError
from moestro.options import check_least, check_types, option

CLASSIFIERS = ("text", "trace")


@dataclass(frozen=True)
class RouteOptions:
    """How the router of domains is fitted. Environment twins: `MOESTRO_CLASSIFIER`, `MOESTRO_THRESHOLD`, ...

    Raises:
        RouteError: a value is not valid, or has no effect beside the others.
    """

    classifier: str = option("text", "By what domains are told: text, or trace (experts that the base uses).")
    threshold: float = option(0.5, "Least probability at which a variant answers; below it the base does.")
    layers: int = option(0, "MoE layers whose experts `trace` looks at (0: 4, or all where there are fewer).")
    most_examples: int = option(50, "Most example prompts of a file, evenly spread over it (0: all).")

    def __post_init__(self) -> None:
        check_types(self, RouteError)
        check_least(self, RouteError, layers=0, most_examples=0)
        if self.classifier not in CLASSIFIERS:
            raise RouteError(f"classifier is {self.classifier!r}, expected one of: {', '.join(CLASSIFIERS)}.")
        if not 0 <= self.threshold <= 1:
            raise RouteError(f"threshold is {self.threshold}, expected a probability from 0 to 1.")
        if self.layers and self.classifier != "trace":
            raise RouteError("layers is for the classifier trace: the text has none. Leave it out.")
