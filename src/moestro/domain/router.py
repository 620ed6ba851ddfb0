"""From the probabilities of domains to the variant that answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moestro.domain.classifiers import Classifier, Prompt

BASE = "base"
"""The domain of everything that is for no variant."""

AUTO = "auto"
"""The name in place of a variant's that leaves the choice to the router."""


@dataclass(frozen=True)
class Choice:
    """Who answers a prompt.

    Attributes:
        variant: its name; None: the base.
        domain: the likeliest one, which may be another than answers: see `DomainRouter`.
        confidence: its probability.
        tokens: of the prompt that were run under the base only to choose.
        seconds: that this took.
    """

    variant: str | None
    domain: str
    confidence: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class DomainRouter:
    """A fitted classifier of `domains` (variants' names and `BASE`), and how sure it has to be.

    `left_out` is the share of its example prompts whose domain was found while they were left out of the fit. The base
    answers what is likeliest `BASE`, what is below `threshold`, and what is for a variant that is not there.
    """

    classifier: Classifier
    domains: tuple[str, ...]
    threshold: float
    left_out: float

    def choose(self, prompt: Prompt, available: Collection[str]) -> Choice:
        """Who answers, of the variants that are `available` now."""
        opinion = self.classifier.judge(prompt)
        best = int(opinion.probabilities_D.argmax())
        domain, confidence = self.domains[best], float(opinion.probabilities_D[best])
        fit = domain != BASE and domain in available and confidence >= self.threshold
        return Choice(domain if fit else None, domain, confidence, opinion.tokens, opinion.seconds)
