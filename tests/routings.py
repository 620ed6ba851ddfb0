"""Routing and planes for tests: what policies and predictors are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moestro.keys import PlaneKey
from moestro.policy.observation import RequestRows, Routing, Shape

SHAPES = [
    Shape(layers=3, experts=8, picks=2),
    Shape(layers=1, experts=4, picks=2),
    Shape(layers=2, experts=1, picks=1),
    Shape(layers=2, experts=3, picks=3),
    Shape(layers=5, experts=64, picks=1),
]


class Free:
    """Evictable planes of 4096 bytes each."""

    def __init__(self, *keys: PlaneKey) -> None:
        self.keys = keys

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __iter__(self) -> Iterator[PlaneKey]:
        return iter(self.keys)

    def nbytes(self, _key: PlaneKey) -> int:
        return 4096


class Watcher(Protocol):
    """What predictors and keep policies have in common."""

    def begin(self, request: int, /) -> None: ...

    def end(self, request: int, /) -> None: ...

    def observe(self, routing: Routing, /) -> None: ...


def routing(shape: Shape, layer: int, rows: Sequence[Sequence[int]], requests: Sequence[RequestRows]) -> Routing:
    """With weights that fall within a row; ids in the narrow type that traces have."""
    experts_TK = np.array(rows, np.uint8).reshape(len(rows), shape.picks)
    weights_K = np.arange(shape.picks, 0, -1, dtype=np.float32)
    weights_TK = np.tile(weights_K / weights_K.sum(), (len(rows), 1))
    return Routing.of(layer, experts_TK, weights_TK, requests, experts=shape.experts)


def token(shape: Shape, layer: int, *experts: int, request: int = 1) -> Routing:
    """One decoded row."""
    return routing(shape, layer, [experts], [RequestRows(request, 0, 1, decode=True)])


def tokens(shape: Shape, passes: Iterable[Sequence[Sequence[int]]], *, request: int = 1) -> Iterator[Routing]:
    """Passes of one decoded row each: the experts of each layer."""
    for one in passes:
        for layer, experts in enumerate(one):
            yield token(shape, layer, *experts, request=request)


def random_pass(shape: Shape, rng: np.random.Generator, parts: Sequence[tuple[int, int, bool]]) -> list[Routing]:
    """One forward pass; `parts` are (request, rows, decode)."""
    requests, first = [], 0
    for request, count, decode in parts:
        requests.append(RequestRows(request, first, first + count, decode))
        first += count
    made = []
    for layer in range(shape.layers):
        scores_TE = rng.random((first, shape.experts)) ** (1 + np.arange(shape.experts) % 3)
        made.append(routing(shape, layer, np.argsort(-scores_TE, axis=1)[:, : shape.picks].tolist(), requests))
    return made


def busy(shape: Shape, seed: int, *, passes: int, prompt: int = 40) -> Iterator[int | Routing]:
    """Requests come and go, up to 16 at once; a number n begins request n, -n ends it."""
    rng = np.random.default_rng(seed)
    running: dict[int, int] = {}
    born = 0
    for _ in range(passes):
        while len(running) < 16 and (not running or rng.random() < 0.5):
            born += 1
            running[born] = 0
            yield born
        parts = []
        for request, age in running.items():
            rows = 1 if age else int(rng.integers(0, prompt + 1))
            parts.append((request, rows, age > 0))
            running[request] += 1
        yield from random_pass(shape, rng, parts)
        for request in [each for each in running if rng.random() < 0.2]:
            del running[request]
            yield -request


def show(watcher: Watcher, event: int | Routing) -> None:
    """Tells what `busy` yields."""
    if isinstance(event, Routing):
        watcher.observe(event)
    elif event > 0:
        watcher.begin(event)
    else:
        watcher.end(-event)
