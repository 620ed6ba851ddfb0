"""What reading experts through the kernel's page cache takes: a file that is mapped, and no knowledge of experts.

The model, which errs in favour of the page cache: pages of the file leave in the order of their last use. The pages of
an expert are used together and in order, so an expert that has lost its first pages loses the others while they are
read again, and pages come to the same as whole experts. An absent page costs a fault, which reads a window ahead
(`read_ahead_kb` of Linux); the next window is asked for when one has arrived, and is read while that one is computed
with. Experts are computed in the order of their numbers, so nothing is read while another expert is computed. Faults
themselves, copies and the second chance that the kernel gives to pages cost nothing here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from moestro.memory.planes import CacheStats
from moestro.policy.foresight import Foreseen
from moestro.simulate.link import LinkBytes
from moestro.simulate.passes import passes
from moestro.simulate.timed import Machine, TimedResult
from moestro.trace.trace import Trace

READ_AHEAD = 128 << 10
"""Bytes of a window: what Linux has for a disk unless told otherwise."""


def replay_page_cache(
    trace: Trace, *, expert_bytes: Sequence[int], memory: int, machine: Machine, concurrency: int = 1
) -> TimedResult:
    """Replay the whole trace, from an empty cache. `expert_bytes`: of each layer, the size of an expert."""
    cache = _Cache(memory)
    stats, carried = CacheStats(), LinkBytes()
    now_s = 0.0
    for one in passes(trace, concurrency=concurrency):
        for layer, size in enumerate(expert_bytes):
            now_s += machine.layer_s
            for expert in np.unique(trace.experts_NLK[one.rows_B, layer]).tolist():
                if cache.use((layer, expert), size):
                    stats.hits += 1
                else:
                    stall_s = _stall(size, machine)
                    stats.misses += 1
                    stats.bytes_read += size
                    stats.stall_seconds += stall_s
                    carried.demand += size
                    now_s += stall_s
                now_s += machine.expert_s
    return TimedResult(trace.rows, now_s, stats, carried, Foreseen())


class _Cache:
    def __init__(self, memory: int) -> None:
        self._free = memory
        self._oldest_first: OrderedDict[tuple[int, int], int] = OrderedDict()

    def use(self, key: tuple[int, int], size: int) -> bool:
        """Whether it was there; it is afterwards."""
        if key in self._oldest_first:
            self._oldest_first.move_to_end(key)
            return True
        while self._free < size and self._oldest_first:
            self._free += self._oldest_first.popitem(last=False)[1]
        self._free -= size
        self._oldest_first[key] = size
        return False


def _stall(size: int, machine: Machine) -> float:
    """Seconds that computing an absent expert waits for its windows."""
    windows = -(-size // READ_AHEAD)
    nbytes = size / windows
    onward_s = nbytes / machine.device_bytes_per_s if machine.device_bytes_per_s else 0.0
    read_s = max(machine.latency_s + nbytes / machine.bytes_per_s, onward_s)
    computed_s = machine.expert_s / windows
    return read_s + (windows - 1) * max(0.0, read_s - computed_s)
