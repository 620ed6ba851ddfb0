"""MoE-Infinity's prediction: the past requests most like this one so far say what it will use.

Source: Xue et al., "MoE-Infinity", arXiv 2401.14361: the request's activation matrix is matched to the collection after
every layer; the nearest entries, added up and each row normalised, are pEAM. A row of tokens takes K experts, so an
expert is used with probability min(1, K pEAM).
Shapes: R requests, L MoE layers, E experts per layer, M entries, K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import any_of, within
from moestro.policy.predictors.popularity import Rates
from moestro.trace.collection import EamCollection, Matcher


@dataclass(slots=True)
class Followed:
    """A request being matched. `counts_LE` are those of its decoded rows, or None when nobody will store them."""

    matcher: Matcher
    counts_LE: np.ndarray | None
    entries_M: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    similarity_M: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class Matching:
    """The requests in flight, each with the entries of the collection that are nearest to it.

    With no collection given it has one of its own, of what the requests that ended decoded; a given one it only reads
    (a recorder fills it).
    """

    def __init__(self, shape: Shape, collection: EamCollection | None, *, nearest: int) -> None:
        assert collection is None or (collection.layers, collection.experts) == (shape.layers, shape.experts)
        assert nearest >= 1
        self._learn = collection is None
        self._shape, self._nearest = shape, nearest
        self.collection = EamCollection(shape.layers, shape.experts) if collection is None else collection
        self.followed: dict[int, Followed] = {}

    def begin(self, request: int) -> None:
        """Nothing is known of it."""
        counts_LE = np.zeros((self._shape.layers, self._shape.experts), np.float32) if self._learn else None
        self.followed[request] = Followed(Matcher(self.collection), counts_LE)

    def end(self, request: int) -> None:
        """Into the own collection, if there is something to say."""
        counts_LE = self.followed.pop(request).counts_LE
        if counts_LE is not None and counts_LE.any():
            self.collection.insert(counts_LE)

    def observe(self, routing: Routing) -> list[tuple[int, bool]]:
        """Matches anew each request that has rows; returns whether its nearest entries are others than before."""
        changed = []
        for rows in routing.requests:
            followed = self.followed[rows.request]
            counts_E = routing.counts_E
            if len(routing.requests) > 1:
                ids = routing.experts_TK[rows.first : rows.last]
                counts_E = np.bincount(ids.ravel(), minlength=self._shape.experts)
            if followed.counts_LE is not None and rows.decode:
                followed.counts_LE[routing.layer] += counts_E
            followed.matcher.observe(routing.layer, counts_E)
            entries_M, similarity_M = followed.matcher.nearest(self._nearest)
            other = not np.array_equal(entries_M, followed.entries_M)
            followed.entries_M, followed.similarity_M = entries_M, similarity_M
            changed.append((rows.request, other))
        return changed


class EamcPredictor:
    """`nearest` entries are added up, by similarity. Until there is an entry, and in layers none knows: popularity."""

    def __init__(self, shape: Shape, collection: EamCollection | None = None, *, nearest: int = 8) -> None:
        self._picks = shape.picks
        self._matching = Matching(shape, collection, nearest=nearest)
        self._rates = Rates(shape)

    def begin(self, request: int, /) -> None:
        """Nothing is known of it yet: popularity."""
        self._matching.begin(request)

    def end(self, request: int, /) -> None:
        """Its matrix becomes an entry, if the collection is the predictor's own."""
        self._matching.end(request)

    def observe(self, routing: Routing, /) -> None:
        """O(K n) for n entries, per request."""
        self._rates.add(routing)
        self._matching.observe(routing)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        popular_E = self._rates.of(layer)
        chance_RE = [self._chance(followed, layer, popular_E) for followed in self._matching.followed.values()]
        return within(any_of(np.stack(chance_RE) if chance_RE else popular_E[None]), horizon)

    def _chance(self, followed: Followed, layer: int, popular_E: np.ndarray) -> np.ndarray:
        if not len(followed.entries_M):
            return popular_E
        share_E = self._matching.collection.probabilities(
            followed.entries_M, np.maximum(followed.similarity_M, 1e-6), layers=slice(layer, layer + 1)
        )[0]
        return np.minimum(1, self._picks * share_E) if share_E.any() else popular_E
