"""Small domains made by chance: texts of other alphabets or words, routings with other favourite experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.domain import RoutedExample, RoutedPrompt

LAYERS, EXPERTS, PICKS = 3, 16, 2

_WORDS = {
    "base": [
        "the",
        "of",
        "and",
        "with",
        "from",
        "water",
        "letter",
        "house",
        "river",
        "number",
        "people",
        "which",
        "their",
    ],
    "code": ["def", "return", "import", "self", "for", "in", "range", "None", "class", "lambda", "yield", "assert"],
    "sums": ["12", "+", "7", "=", "19", ";", "3", "*", "4", "88", "-", "5", "sum"],
}


def texts(domain: str, count: int, *, words: int = 60, seed: int = 0) -> list[str]:
    """So many prompts of a domain."""
    rng = np.random.default_rng([seed, *domain.encode()])
    return [" ".join(rng.choice(_WORDS[domain], words)) for _ in range(count)]


def examples(count: int = 6) -> dict[str, list[str]]:
    """Of every domain."""
    return {domain: texts(domain, count) for domain in _WORDS}


def routing(domain: str, rows: int, *, seed: int = 0) -> np.ndarray:
    """Ids [rows, L, K] of a prompt: a domain has its own favourites in every layer."""
    rng = np.random.default_rng([seed, *domain.encode()])
    favourites = np.random.default_rng([*domain.encode()]).random((LAYERS, EXPERTS)) * 2
    noise = rng.gumbel(size=(rows, LAYERS, EXPERTS))
    return (favourites + noise).argsort(axis=-1)[..., -PICKS:]


def routings(count: int = 6) -> dict[str, list[RoutedExample]]:
    """Of every domain."""
    return {domain: [RoutedExample(routing(domain, 80, seed=one)) for one in range(count)] for domain in _WORDS}


@dataclass(frozen=True)
class Asked:
    """A prompt whose routing is known."""

    text: str
    experts_NLK: np.ndarray | None = None

    def routed(self, layers: int) -> RoutedPrompt:
        assert self.experts_NLK is not None, "nobody should have asked for the routing"
        return RoutedPrompt(self.experts_NLK[:, :layers], 0.25)
