"""In which order the chains of a layer are read that are not in memory. Pure: no file, no clock, no thread.

One disk feeds one computation: a chain is computed with once its planes have arrived, and what is resident is computed
with meanwhile, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChainLoad:
    """A chain that has to be read, at least in part.

    `expert` is whose; chains of one expert share their first planes. `planes` is how many it has; `tokens` are computed
    with it. `read_s` is how long reading what is missing of it takes, `compute_s` the computation after it.
    """

    expert: int
    planes: int
    tokens: int
    read_s: float
    compute_s: float


LoadOrder = Callable[[Sequence[ChainLoad]], list[int]]
"""The positions of the chains in the order in which to read them, each once."""
