"""Two ways to tell the domain of a prompt, behind one protocol: from its text, from the experts it uses.

Shapes: D domains, F features, L MoE layers, E experts of a layer, N rows (tokens), K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from moestro.domain.features import FEATURES, features_of
from moestro.trace.eam import eam_of_rows, shares_of


@dataclass(frozen=True, eq=False)
class RoutedPrompt:
    """What the base made of a prompt's first tokens: ids `experts_NLK` of its first layers, and the seconds it took."""

    experts_NLK: np.ndarray
    seconds: float


class Prompt(Protocol):
    """A prompt that a variant is looked for. What a classifier does not ask for costs nothing."""

    @property
    def text(self) -> str: ...

    def routed(self, layers: int) -> RoutedPrompt:
        """Run its first tokens through the routers of the base's first `layers` MoE layers."""
        ...


@dataclass(frozen=True)
class Opinion:
    """Probabilities of the domains, in their order, and what finding them took of the model."""

    probabilities_D: np.ndarray
    tokens: int = 0
    seconds: float = 0.0


class Classifier(Protocol):
    """Tells the domain of a prompt. `kind` is its name in files and commands."""

    kind: ClassVar[str]

    def judge(self, prompt: Prompt) -> Opinion:
        """How likely each domain is."""
        ...


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear model: `weights_DF` and `bias_D`, float32, whose softmax are calibrated probabilities."""

    weights_DF: np.ndarray
    bias_D: np.ndarray

    def probabilities(self, values_F: np.ndarray, places_F: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Of features that have these values at these places and are 0 elsewhere: float64 [D], with the sum 1."""
        scores_D = self.weights_DF[:, places_F].astype(np.float64) @ values_F + self.bias_D
        likely_D = np.exp(scores_D - scores_D.max())
        probabilities_D: np.ndarray = likely_D / likely_D.sum()
        return probabilities_D


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """Hashed character n-grams and words and a linear model: no work for the model, under a millisecond."""

    linear: Linear
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        assert self.linear.weights_DF.shape[1] == FEATURES

    def judge(self, prompt: Prompt) -> Opinion:
        found = features_of(prompt.text)
        return Opinion(self.linear.probabilities(found.values_F, found.places_F))


@dataclass(frozen=True, eq=False)
class TraceClassifier:
    """How often the prompt's tokens use each expert of the base's first `layers` MoE layers, and a linear model.

    Layer 1 needs no expert's weights: only those before a router have to be computed.
    """

    linear: Linear
    layers: int
    experts: int
    kind: ClassVar[str] = "trace"

    def __post_init__(self) -> None:
        assert self.linear.weights_DF.shape[1] == self.layers * self.experts

    def judge(self, prompt: Prompt) -> Opinion:
        routed = prompt.routed(self.layers)
        values_F = fingerprint(routed.experts_NLK, self.experts)
        return Opinion(self.linear.probabilities(values_F), len(routed.experts_NLK), routed.seconds)


def fingerprint(experts_NLK: np.ndarray, experts: int) -> np.ndarray:
    """Square roots of the share of each expert in its layer, float32 [L * E], of Euclidean length 1.

    Roots, because the distance between them (Hellinger's) weighs rare and common experts alike.
    """
    shares_LE = shares_of(eam_of_rows(experts_NLK, experts))
    values_LE: np.ndarray = np.sqrt(shares_LE) / np.float32(np.sqrt(len(shares_LE)))
    return values_LE.ravel()
