"""Fitting classifiers to a few example prompts per domain, with scikit-learn.

A linear model of many weak features, because examples are few. Prompts come in all lengths: each example is also learnt
from in short pieces, without which prompts of 16 tokens are right 10 times in 100 less often.

Shapes: D domains, F features, P pieces, L MoE layers, E experts of a layer, N rows, K experts per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.domain.classifiers import Linear, TextClassifier, TraceClassifier, fingerprint
from moestro.domain.features import FEATURES, features_of
from moestro.domain.router import BASE, DomainRouter
from moestro.errors import RouteError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LEAST_EXAMPLES = 2
"""Of a domain: one is learnt from while the other tells how sure to be."""

_CHARACTERS = (50, 200)
_ROWS = (16, 64)
"""Lengths of the pieces, about the same in characters and in tokens."""

_INVERSE_PENALTY = 30.0
"""Of scikit-learn's C. From 5 to 300 accuracy is the same within 1 in 100."""

_FOLDS = 5
_TEMPERATURES = np.geomspace(0.5, 20.0, 121)
"""Where all examples left out are right, the coldest would be best, and be as sure of what resembles no example."""


@dataclass(frozen=True, eq=False)
class RoutedExample:
    """An example prompt as the base routes it: ids [N, L, K] of its tokens, in the first layers."""

    experts_NLK: np.ndarray


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Features of the pieces of all examples, [P, F]; the domain's number and the example's number of each."""

    values_PF: csr_matrix
    domain_P: np.ndarray
    example_P: np.ndarray


def fit_text(examples: Mapping[str, Sequence[str]], *, threshold: float) -> DomainRouter:
    """A router by text, of prompts by domain; `BASE` is the domain of what is for no variant.

    Raises:
        RouteError: scikit-learn is missing, there are too few examples or domains, or the threshold is none.
    """
    check_examples(examples, threshold)
    sparse = _scikit_learn().sparse
    found = [
        (features_of(piece), domain, example)
        for domain, example, text in _numbered(examples)
        for piece in _pieces_of_text(text)
    ]
    ends = np.cumsum([0, *(len(one.places_F) for one, _, _ in found)])
    values, places = (np.concatenate([getattr(one, name) for one, _, _ in found]) for name in ("values_F", "places_F"))
    values_PF = sparse.csr_matrix((values, places, ends), shape=(len(found), FEATURES))
    linear, left_out = _fit(_Pieces(values_PF, *_numbers(found)), len(examples))
    return DomainRouter(TextClassifier(linear), tuple(examples), threshold, left_out)


def fit_trace(examples: Mapping[str, Sequence[RoutedExample]], *, experts: int, threshold: float) -> DomainRouter:
    """A router by what the base routes, of examples that all have the same number of layers; `experts` of a layer.

    Raises:
        RouteError: as `fit_text`.
    """
    check_examples(examples, threshold)
    sparse = _scikit_learn().sparse
    found = [
        (fingerprint(piece_NLK, experts), domain, example)
        for domain, example, one in _numbered(examples)
        for piece_NLK in _pieces_of_rows(one.experts_NLK)
    ]
    values_PF = sparse.csr_matrix(np.stack([values_F for values_F, _, _ in found]))
    linear, left_out = _fit(_Pieces(values_PF, *_numbers(found)), len(examples))
    classifier = TraceClassifier(linear, layers=values_PF.shape[1] // experts, experts=experts)
    return DomainRouter(classifier, tuple(examples), threshold, left_out)


def check_examples(examples: Mapping[str, Sequence[object]], threshold: float) -> None:
    """What can be told before any work. Raises RouteError as `fit_text`."""
    _scikit_learn()
    if not 0 <= threshold <= 1:
        raise RouteError(f"The threshold is {threshold}, expected a probability from 0 to 1.")
    if len(examples) < 2 or BASE not in examples:
        raise RouteError(
            f"There are examples of {', '.join(examples) or 'nothing'}. Expected those of at least one variant, and of "
            f"what is for none: --examples NAME=FILE --examples {BASE}=FILE."
        )
    for name, some in examples.items():
        if len(some) < LEAST_EXAMPLES:
            raise RouteError(
                f"{name} has {len(some)} example prompt(s), expected at least {LEAST_EXAMPLES}; 20 or more are better."
            )


def _numbered(examples: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, int, Any]]:
    """Number of the domain, number of the example among all, the example."""
    example = 0
    for domain, some in enumerate(examples.values()):
        for one in some:
            yield domain, example, one
            example += 1


def _numbers(found: Sequence[tuple[object, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([domain for _, domain, _ in found]), np.array([example for _, _, example in found])


def _pieces_of_text(text: str) -> list[str]:
    return [text, *(text[first:last] for first, last in _cuts(len(text), _CHARACTERS))]


def _pieces_of_rows(experts_NLK: np.ndarray) -> list[np.ndarray]:
    return [experts_NLK, *(experts_NLK[first:last] for first, last in _cuts(len(experts_NLK), _ROWS))]


def _cuts(length: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pieces of each size that are smaller than the whole; a last one of under half the size is left out."""
    for size in sizes:
        for first in range(0, length if size < length else 0, size):
            if min(size, length - first) >= size // 2:
                yield first, min(length, first + size)


def _fit(pieces: _Pieces, domains: int) -> tuple[Linear, float]:
    """Logistic regression, its scores divided by the temperature at which examples left out are likeliest; and what
    share of them are told right."""
    scores_PD = np.zeros((len(pieces.domain_P), domains))
    for learnt, held_out in _folds(pieces):
        linear = _regression(pieces, learnt, domains)
        scores_PD[held_out] = pieces.values_PF[held_out] @ linear.weights_DF.T + linear.bias_D
    temperature = _temperature(scores_PD, pieces.domain_P)
    _, wholes = np.unique(pieces.example_P, return_index=True)  # an example comes first, then its pieces
    right = float(np.mean(scores_PD[wholes].argmax(axis=1) == pieces.domain_P[wholes]))
    whole = _regression(pieces, np.arange(len(pieces.domain_P)), domains)
    weights_DF, bias_D = ((part / temperature).astype(np.float32) for part in (whole.weights_DF, whole.bias_D))
    return Linear(weights_DF, bias_D), right


def _folds(pieces: _Pieces) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts to learn from and parts left out. An example's pieces stay together, each domain is in every part."""
    fewest = min(
        len(set(pieces.example_P[pieces.domain_P == domain].tolist())) for domain in set(pieces.domain_P.tolist())
    )
    number = min(_FOLDS, fewest)
    order = np.zeros(len(pieces.domain_P), dtype=np.int64)
    for domain in set(pieces.domain_P.tolist()):
        ours = pieces.domain_P == domain
        _, places = np.unique(pieces.example_P[ours], return_inverse=True)
        order[ours] = places % number
    return [(np.flatnonzero(order != fold), np.flatnonzero(order == fold)) for fold in range(number)]


def _regression(pieces: _Pieces, chosen_P: np.ndarray, domains: int) -> Linear:
    domain_P = pieces.domain_P[chosen_P]
    shares_D = np.bincount(domain_P, minlength=domains) / len(domain_P)
    # Domains weigh the same, or the base, of which there are examples of many kinds, would be expected most: from 5
    # examples of each kind of the built-in model's texts 78% are found in the mean of domains, rather than 72%.
    weights_P = 1.0 / (shares_D[domain_P] * domains)
    model = _scikit_learn().LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
    model.fit(pieces.values_PF[chosen_P], domain_P, sample_weight=weights_P)
    weights_DF, bias_D = model.coef_, model.intercept_
    if domains == 2:  # scikit-learn keeps the difference between the two
        weights_DF, bias_D = np.vstack([-weights_DF, weights_DF]) / 2, np.append(-bias_D, bias_D) / 2
    return Linear(weights_DF, bias_D)


def _temperature(scores_PD: np.ndarray, domain_P: np.ndarray) -> float:
    """Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599): one number, so few examples do."""
    shares_D = np.bincount(domain_P) / len(domain_P)
    weights_P = 1.0 / shares_D[domain_P]

    def loss(temperature: float) -> float:
        scaled_PD = scores_PD / temperature
        highest_P = scaled_PD.max(axis=1)
        sums_P = np.log(np.exp(scaled_PD - highest_P[:, None]).sum(axis=1)) + highest_P
        return float(np.average(sums_P - scaled_PD[np.arange(len(domain_P)), domain_P], weights=weights_P))

    return float(min(_TEMPERATURES, key=loss))


class _ScikitLearn:
    """What is used of it, imported when it is."""

    def __init__(self) -> None:
        try:
            from scipy import sparse
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise RouteError(
                f"Fitting a router needs scikit-learn, which is not installed ({error}). Install it with "
                "`pip install 'moestro[route]'`; choosing with a router that is fitted does not need it."
            ) from error
        self.sparse, self.LogisticRegression = sparse, LogisticRegression


def _scikit_learn() -> _ScikitLearn:
    return _ScikitLearn()
