"""What a policy that says which experts to keep sees and says. Pure: no file, no clock, no thread, no tensor.

Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moestro.policy.observation import Routing


class KeepPolicy(Protocol):
    """Puts a worth on keeping each expert in memory. Of those that may leave, the one of least worth does.

    `proportional` says that twice the worth means twice as likely to be used soon; `lasting`, that a layer changes
    little of what others are worth.
    """

    proportional: bool
    lasting: bool

    def begin(self, request: int, /) -> None:
        """A request's first forward pass is about to run."""
        ...

    def end(self, request: int, /) -> None:
        """Nothing more comes of this request."""
        ...

    def observe(self, routing: Routing, /) -> None:
        """A layer has routed: before anything is loaded for it."""
        ...

    def loaded(self, layer: int, expert: int, /) -> None:
        """The expert got its first slot."""
        ...

    def evicted(self, layer: int, expert: int, /) -> None:
        """The expert lost its last slot."""
        ...

    def worth(self, layer: int, /) -> np.ndarray:
        """[L, E], larger stays longer; comparable across layers. `layer`, observed last, is what needs room."""
        ...
