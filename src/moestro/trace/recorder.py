"""Recording what a running model routes: rows are copied as they come, and looked at when their request ends.

Shapes: T rows of a step, N rows of a request, L MoE layers, K experts per row, E experts per layer, P layers ahead,
C candidates of a lookahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from moestro.errors import TraceError
from moestro.trace.checks import WEIGHT_SCALE
from moestro.trace.collection import Collections, new_id
from moestro.trace.eam import eam_of_rows
from moestro.trace.trace import Trace

_PUT_BY = 64
"""Most steps that wait to be looked at."""

PUT_BY_ROWS = 256
"""With so many rows or more they are looked at as well."""


class StepRouting(NamedTuple):
    """What one forward pass routed: ids `experts_LTK` (integers, in any order within a row), weights `weights_LTK`
    (normalised or not), and `lookahead_LTPC` as in `Trace` where it was computed."""

    experts_LTK: np.ndarray
    weights_LTK: np.ndarray
    lookahead_LTPC: np.ndarray | None = None


class Chunk(Protocol):
    """New tokens of one request in a forward pass; `decode`: they are of the answer. Its rows follow those of the chunk
    before it."""

    @property
    def request(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def decode(self) -> bool: ...


class Recorder:
    """Takes the steps of a model that serves, several requests at a time.

    Steps are put by as they come and looked at later, many in a row: what is done to each of them costs several times
    as much while a step's weights have just washed everything else out of the processor's caches.

    Args:
        experts: of a layer (the most of any).
        collections: where the matrices of ended requests go (None: nowhere).
        keep: whether all rows are kept for `trace`; else only counts of requests in flight are.
    """

    def __init__(self, experts: int, *, collections: Collections | None = None, keep: bool = False) -> None:
        self._experts, self._collections, self.keep = experts, collections, keep
        self._kind = np.uint8 if experts <= 256 else np.uint16
        self._steps = 0
        self._rows = 0
        self._put_by: list[tuple[Sequence[Chunk], StepRouting]] = []
        self._running: dict[int, _Rows] = {}
        self._ended: dict[int, _Rows] = {}
        self._apart: dict[int, Collections | None] = {}
        self._meta: dict[int, dict[str, Any]] = {}

    def step(self, chunks: Sequence[Chunk], routing: StepRouting) -> None:
        """A forward pass went through. Arrays do not change any more; without `keep`, weights may."""
        self._put_by.append((chunks, routing))
        self._rows += routing.experts_LTK.shape[1]
        if len(self._put_by) == _PUT_BY or self._rows >= PUT_BY_ROWS:
            self._catch_up()

    def take(self, chunks: Sequence[Chunk], routing: StepRouting) -> None:
        """Look at a forward pass."""
        last = 0
        for chunk in chunks:
            rows = self._running.get(chunk.request)
            if rows is None:
                rows = self._running[chunk.request] = _Rows()
            first, last = last, last + len(chunk.token_ids)
            part = slice(first, last)
            rows.add(routing.experts_LTK[:, part].astype(self._kind), decode=chunk.decode)
            if self.keep:
                rows.weights.append(routing.weights_LTK[:, part])
                rows.tokens.append((chunk.token_ids, self._steps, chunk.decode))
                if routing.lookahead_LTPC is not None:
                    rows.lookahead.append(routing.lookahead_LTPC[:, part].astype(self._kind))
        self._steps += 1

    def describe(self, request: int, meta: dict[str, Any]) -> None:
        """What the trace is to say of a request beside its number of prompt tokens; before or after its end."""
        self._meta[request] = meta

    def set_apart(self, request: int, collections: Collections | None) -> None:
        """The matrices of a request go elsewhere than those of others."""
        self._apart[request] = collections

    def end(self, request: int) -> None:
        """Nothing more comes of a request: its matrices go into the collections. Unknown requests are passed over."""
        self._catch_up()
        rows = self._running.pop(request, None)
        collections = self._apart.pop(request, self._collections)
        if rows is None:
            return
        if collections is not None:
            self._collect(rows, collections)
        if self.keep:
            self._ended[request] = rows

    def trace(self) -> Trace:
        """All requests that have ended, in the order of their numbers. Raises TraceError when there is none."""
        assert self.keep
        if not self._ended:
            raise TraceError("Nothing was recorded: no request has ended. Give a prompt or a text.")
        numbers = sorted(self._ended)
        ended = [self._ended[request].finished() for request in numbers]
        ahead = [one.lookahead_NPLC for one in ended if one.lookahead_NPLC is not None]
        return Trace(
            experts_NLK=np.concatenate([one.experts_NLK for one in ended]),
            weights_NLK=np.concatenate([one.weights_NLK for one in ended]),
            token_N=np.concatenate([one.token_N for one in ended]),
            offsets_R1=np.cumsum([0, *(len(one.token_N) for one in ended)], dtype=np.int64),
            meta=tuple(
                {**self._meta.get(request, {}), "prompt_tokens": self._ended[request].prompt} for request in numbers
            ),
            num_experts=self._experts,
            decode_N=np.concatenate([one.decode_N for one in ended]),
            step_N=np.concatenate([one.step_N for one in ended]),
            lookahead_NPLC=np.concatenate(ahead) if ahead else None,
            source="The recorded trace",
        )

    def _catch_up(self) -> None:
        for chunks, routing in self._put_by:
            self.take(chunks, routing)
        self._put_by.clear()
        self._rows = 0
        if not self.keep:
            for rows in self._running.values():
                rows.count(self._experts, keep=False)

    def _collect(self, rows: _Rows, collections: Collections) -> None:
        rows.count(self._experts, keep=self.keep)
        number = new_id()
        for phase, counts_LE in rows.counts.items():
            collections.phases[phase].insert(counts_LE, id=number)


@dataclass(frozen=True, slots=True)
class _Finished:
    """The part of a trace that is one request."""

    experts_NLK: np.ndarray
    weights_NLK: np.ndarray
    token_N: np.ndarray
    decode_N: np.ndarray
    step_N: np.ndarray
    lookahead_NPLC: np.ndarray | None


class _Rows:
    """What came of one request so far, of each step: arrays [L, rows, ...], and (tokens, step, decode).

    `prompt`: how many rows are the prompt's. `counts`: of each phase [L, E], as of the last `count`.
    """

    __slots__ = ("_uncounted", "counts", "experts", "lookahead", "prompt", "tokens", "weights")

    def __init__(self) -> None:
        self.prompt = 0
        self.counts: dict[str, np.ndarray] = {}
        self._uncounted: dict[str, list[np.ndarray]] = {"prefill": [], "decode": []}
        self.experts: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.lookahead: list[np.ndarray] = []
        self.tokens: list[tuple[Sequence[int], int, bool]] = []

    def add(self, experts_LTK: np.ndarray, *, decode: bool) -> None:
        """Rows of a step."""
        self.experts.append(experts_LTK)
        self._uncounted["decode" if decode else "prefill"].append(experts_LTK)
        if not decode:
            self.prompt += experts_LTK.shape[1]

    def count(self, experts: int, *, keep: bool) -> None:
        """Bring `counts` up to date, and forget the rows if they are not to be kept."""
        for phase, parts in self._uncounted.items():
            if parts:
                self.counts[phase] = eam_of_rows(_joined(parts), experts) + self.counts.get(phase, 0)
                parts.clear()
        if not keep:
            self.experts.clear()

    def finished(self) -> _Finished:
        experts_NLK, weights_NLK = _joined(self.experts), _joined(self.weights)
        order_NLK = (-weights_NLK).argsort(axis=-1, kind="stable")
        tokens, steps, decode = zip(*self.tokens, strict=True)
        lengths = [len(one) for one in tokens]
        return _Finished(
            experts_NLK=np.take_along_axis(experts_NLK, order_NLK, axis=-1),
            weights_NLK=quantised_weights(np.take_along_axis(weights_NLK, order_NLK, axis=-1)),
            token_N=np.fromiter(chain.from_iterable(tokens), np.int32),
            decode_N=np.repeat(np.array(decode, dtype=bool), lengths),
            step_N=np.repeat(np.array(steps, dtype=np.int32), lengths),
            lookahead_NPLC=_joined(self.lookahead).swapaxes(1, 2) if self.lookahead else None,
        )


def quantised_weights(weights_NLK: np.ndarray) -> np.ndarray:
    """Weights as a trace holds them: uint8, 255 times the share of the row's sum. Rows of zeros share alike."""
    sums = weights_NLK.sum(axis=-1, keepdims=True, dtype=np.float64)
    alike = 1 / weights_NLK.shape[-1]
    shares_NLK = np.divide(weights_NLK, sums, out=np.full(weights_NLK.shape, alike), where=sums > 0)
    rounded_NLK: np.ndarray = np.rint(WEIGHT_SCALE * shares_NLK)
    return rounded_NLK.astype(np.uint8)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays [L, rows, ...] as one [N, L, ...]."""
    return np.concatenate(parts, axis=1).swapaxes(0, 1)
