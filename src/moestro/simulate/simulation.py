"""All that `moestro simulate` says of a policy: hit rates by the yardstick, and time, bytes and stalls of a timed replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moestro.config import SimulateOptions
from moestro.errors import TraceError
from moestro.foresight import NETS_FILE, load_nets, train
from moestro.memory.budget import parse_bytes
from moestro.memory.pages import PAGE, round_up
from moestro.policy import make_policy
from moestro.policy.observation import Shape
from moestro.policy.predictors.net import Nets
from moestro.simulate.contender import Contender, make_contender, needs_nets
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import Foreseen, Machine, TimedReplay, TimedResult
from moestro.trace.trace import Trace

_EXPERTS_SHARE = 0.6
"""Of the time that a layer takes for a token, what goes into its experts. Measured: 13 of 21 ms (OLMoE's shape)."""

_LATENCY_S = 1e-4


@dataclass(frozen=True)
class Simulated:
    """`hit_rate` and those beside it: prefetch off, `slots` in every layer; the others: one cache for all layers."""

    slots: int
    accesses: int
    hit_rate: float
    lru_hit_rate: float
    belady_hit_rate: float
    tokens: int
    timed: TimedResult
    lru: TimedResult

    @property
    def gap_closed(self) -> float:
        """Share of the way from LRU to Belady."""
        return (self.hit_rate - self.lru_hit_rate) / max(self.belady_hit_rate - self.lru_hit_rate, 1e-12)
