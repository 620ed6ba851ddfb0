"""How fast this machine is, right now: reading memory, reading a store's planes, and multiplying.

Shapes: T rows of a product.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro import _native
from moestro.kernels import make_kernels
from moestro.kernels.base import MatrixSpec
from moestro.memory.pages import PAGE, HostBuffer
from moestro.memory.tickets import Read, Ticket
from moestro.memory.transfer import TransferEngine
from moestro.quant.groups import group_size
from moestro.quant.random_codes import random_regions
from moestro.runtime.level import cut
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.layout import TensorLayout
from moestro.store.reader import Store

SECONDS = 0.5
"""That each measurement takes, about."""

_READING_BYTES = 256 << 20
_SLOTS = 8
_ROWS = 128


def memory_bandwidth(seconds: float = SECONDS, nbytes: int = _READING_BYTES) -> float:
    """Bytes per second at which all compute threads together read memory, far more of it than caches hold."""
    buffer = HostBuffer(nbytes)
    buffer.tensor.fill_(1)
    address = buffer.address
    took = _median_seconds(lambda: _native.sum_words(address, nbytes), seconds)
    buffer.close()
    return nbytes / took


def disk_bandwidth(store: Store, level: int, seconds: float = SECONDS) -> float:
    """Bytes per second at which a transfer engine reads experts in random order, all planes of one at once.

    Raises:
        PlaneReadError: a plane cannot be read.
    """
    extents = list(_extents(store, level))
    random.Random(0).shuffle(extents)
    size = max(extent.nbytes for extent in extents)
    buffer, transfers = HostBuffer(_SLOTS * size), TransferEngine()
    buffer.tensor[::PAGE] = 0
    waiting: deque[Ticket] = deque()
    done, started = 0, time.perf_counter()
    try:
        for number, extent in enumerate(cycle(extents)):
            # An expert must not be in flight to two places.
            if len(waiting) == min(_SLOTS, len(extents)):
                waiting.popleft().wait()
            if time.perf_counter() - started > seconds and number >= _SLOTS:
                break
            place = buffer.view(number % _SLOTS * size, extent.nbytes)
            read = Read(extent.file, extent.offset, extent.nbytes, place, (), "An expert")
            waiting.append(transfers.submit(read, urgent=True))
            done += extent.nbytes
        while waiting:
            waiting.popleft().wait()
        return done / (time.perf_counter() - started)
    finally:
        transfers.close()
        buffer.close()


def multiplications_per_second(store: Store, level: int, threads: int, seconds: float = SECONDS) -> float:
    """Products of a weight and an input per second that the kernels reach with the store's experts, for many rows."""
    kernels = make_kernels("auto", threads=threads)
    planes = cut(store.layers[0].layout, level).planes
    regions = [_widest(plane.tensors) for plane in planes]
    rows, columns = regions[0].shape
    x_TK = torch.ones(_ROWS, columns)
    if regions[0].group_size is None:
        weight_NK = torch.ones(rows, columns, dtype=TORCH_DTYPES[regions[0].dtype])
        took = _median_seconds(lambda: kernels.linear(x_TK, weight_NK), seconds)
    else:
        encoding: Any = regions[0].dtype
        drawn = random_regions(encoding, rows, columns, (level,), 0.01, np.random.default_rng(0))
        aligned = [_aligned(one) for one in drawn.values()]
        spec = MatrixSpec(encoding, rows, columns, group_size(columns), (0,) * len(aligned))
        addresses = [one.data_ptr() for one in aligned]
        took = _median_seconds(lambda: kernels.packed_linear(x_TK, spec, addresses, level), seconds)
    return _ROWS * rows * columns / took


@dataclass(frozen=True)
class _Extent:
    file: Path
    offset: int
    nbytes: int


def _extents(store: Store, level: int) -> Iterator[_Extent]:
    """The planes of an expert lie one after the other."""
    for layer in store.layers:
        nbytes = cut(layer.layout, level).nbytes
        for expert in range(layer.num_experts):
            first = store.plane((layer.layer, expert, 0))
            yield _Extent(first.file, first.offset, nbytes)


def _widest(tensors: Sequence[TensorLayout]) -> TensorLayout:
    """The matrix with most weights."""
    return max((one for one in tensors if len(one.shape) == 2), key=lambda one: one.shape[0] * one.shape[1])


def _aligned(region: torch.Tensor) -> torch.Tensor:
    """A copy that starts on a multiple of 64."""
    room = torch.empty(len(region) + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    placed = room[start : start + len(region)]
    placed.copy_(region)
    return placed


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
