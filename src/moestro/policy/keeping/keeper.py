"""What the policies of this room have in common: an array of worths, hooks that do nothing, what a visit used.

Shapes: T rows of the step, K experts per row, L MoE layers, E experts per layer, U experts that a visit uses.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Routing, Shape


class Keeper:
    """A KeepPolicy that keeps `_worth_LE` up to date; nothing happens at its hooks unless it says so."""

    proportional = False
    lasting = True

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._worth_LE = np.zeros((shape.layers, shape.experts))

    def begin(self, _request: int, /) -> None:
        """A request's first forward pass is about to run."""

    def end(self, _request: int, /) -> None:
        """Nothing more comes of this request."""

    def loaded(self, _layer: int, _expert: int, /) -> None:
        """The expert got its first slot."""

    def evicted(self, _layer: int, _expert: int, /) -> None:
        """The expert lost its last slot."""

    def worth(self, _layer: int, /) -> np.ndarray:
        """[L, E], larger stays longer; changes with the next observation."""
        return self._worth_LE


def used(routing: Routing) -> np.ndarray:
    """[U] the experts that this visit uses, each once."""
    if len(routing.experts_TK) == 1:
        return np.asarray(routing.experts_TK[0])
    return np.flatnonzero(routing.counts_E)


def shares(routing: Routing) -> tuple[np.ndarray, np.ndarray | float]:
    """[U] the experts that this visit uses, and how much of a use it was for each: [U], or 1.0 for all.

    A decoded row's expert counts as one use. In a prompt an expert counts for its share of the rows: streaming a
    prompt touches nearly all experts, which says little about what single rows will ask for.
    """
    ids_U = used(routing)
    if all(rows.decode for rows in routing.requests):
        return ids_U, 1.0
    share_E = np.zeros(len(routing.counts_E))
    for rows in routing.requests:
        ids = routing.experts_TK[rows.first : rows.last]
        if rows.decode:
            share_E[ids] = 1.0
        else:
            counts_E = np.bincount(ids.ravel(), minlength=len(share_E))
            np.maximum(share_E, counts_E / max(len(ids), 1), out=share_E)
    return ids_U, share_E[ids_U]
