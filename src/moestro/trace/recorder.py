"""Recording what a running model routes: rows are copied as they come, and looked at when their request ends.

Shapes: T rows of a step, N rows of a request, L MoE layers, K experts per row, E experts per layer, P layers ahead,
C candidates of a lookahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.errors import TraceError
from moestro.policy.observation import RequestRows
from moestro.trace.checks import WEIGHT_SCALE
from moestro.trace.collection import new_id
from moestro.trace.collection_file import CollectionFile
from moestro.trace.eam import eam_of_rows
from moestro.trace.trace import Trace

_FIRST_ROWS = 64


@dataclass(frozen=True, slots=True)
class StepRouting:
    """What one forward pass routed: ids `experts_LTK` (integers, in any order within a row), weights `weights_LTK`
    (normalised or not), and `lookahead_LTPC` as in `Trace` where it was computed."""

    experts_LTK: np.ndarray
    weights_LTK: np.ndarray
    lookahead_LTPC: np.ndarray | None = None


class Recorder:
    """Takes the steps of a model that serves, several requests at a time.

    Args:
        experts: of a layer (the most of any).
        collections: where the matrices of ended requests go (None: nowhere).
        keep: whether all rows are kept for `trace`; else only requests in flight take memory, L * K bytes a token.
    """

    def __init__(self, experts: int, *, collections: CollectionFile | None = None, keep: bool = False) -> None:
        self._experts, self._collections, self._keep = experts, collections, keep
        self._steps = 0
        self._running: dict[int, _Rows] = {}
        self._ended: dict[int, _Finished] = {}
        self._meta: dict[int, dict[str, Any]] = {}

    def step(self, requests: Sequence[RequestRows], tokens_T: np.ndarray, routing: StepRouting) -> None:
        """A forward pass went through."""
        for one in requests:
            rows = self._running.get(one.request)
            if rows is None:
                rows = self._running[one.request] = _Rows(self._experts, routing, keep=self._keep)
            rows.add(one, routing)
            if self._keep:
                rows.add_details(one, tokens_T, routing, self._steps)
        self._steps += 1

    def describe(self, request: int, meta: dict[str, Any]) -> None:
        """What the trace is to say of a request beside its number of prompt tokens; before or after its end."""
        self._meta[request] = meta

    def end(self, request: int) -> None:
        """Nothing more comes of a request: its matrices go into the collections. Unknown requests are passed over."""
        rows = self._running.pop(request, None)
        if rows is None:
            return
        if self._collections is not None:
            self._collect(rows, self._collections)
        if self._keep:
            self._ended[request] = rows.finished()

    def trace(self) -> Trace:
        """All requests that have ended, in the order of their numbers. Raises TraceError when there is none."""
        assert self._keep
        if not self._ended:
            raise TraceError("Nothing was recorded: no request has ended. Give a prompt or a text.")
        numbers = sorted(self._ended)
        ended = [self._ended[request] for request in numbers]
        ahead = [one.lookahead_NPLC for one in ended if one.lookahead_NPLC is not None]
        return Trace(
            experts_NLK=np.concatenate([one.experts_NLK for one in ended]),
            weights_NLK=np.concatenate([one.weights_NLK for one in ended]),
            token_N=np.concatenate([one.token_N for one in ended]),
            offsets_R1=np.cumsum([0, *(len(one.token_N) for one in ended)], dtype=np.int64),
            meta=tuple(
                {**self._meta.get(request, {}), "prompt_tokens": int((~self._ended[request].decode_N).sum())}
                for request in numbers
            ),
            num_experts=self._experts,
            decode_N=np.concatenate([one.decode_N for one in ended]),
            step_N=np.concatenate([one.step_N for one in ended]),
            lookahead_NPLC=np.concatenate(ahead) if ahead else None,
            source="The recorded trace",
        )

    def _collect(self, rows: _Rows, collections: CollectionFile) -> None:
        number = new_id()
        phases = (rows.experts_NLK[: rows.prompt], rows.experts_NLK[rows.prompt : rows.used])
        for collection, experts_NLK in zip((collections.prefill, collections.decode), phases, strict=True):
            if len(experts_NLK):
                collection.insert(eam_of_rows(experts_NLK, self._experts), id=number)


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
    """The rows of one request so far, in arrays that grow. `used` of them, of which `prompt` are the prompt's."""

    def __init__(self, experts: int, routing: StepRouting, *, keep: bool) -> None:
        layers, _, picks = routing.experts_LTK.shape
        kind = np.uint8 if experts <= 256 else np.uint16
        self.used = self.prompt = 0
        self.experts_NLK = np.empty((_FIRST_ROWS, layers, picks), dtype=kind)
        self._weights_NLK = np.empty((_FIRST_ROWS * keep, layers, picks), dtype=np.float32)
        self._token_N = np.empty(_FIRST_ROWS * keep, dtype=np.int32)
        self._step_N = np.empty(_FIRST_ROWS * keep, dtype=np.int32)
        self._lookahead_NLPC: np.ndarray | None = None
        if keep and routing.lookahead_LTPC is not None:
            self._lookahead_NLPC = np.empty((_FIRST_ROWS, layers, *routing.lookahead_LTPC.shape[2:]), dtype=kind)

    def add(self, one: RequestRows, routing: StepRouting) -> None:
        count = one.last - one.first
        if self.used + count > len(self.experts_NLK):
            self._grow(self.used + count)
        rows_LCK = routing.experts_LTK[:, one.first : one.last]
        self.experts_NLK[self.used : self.used + count] = rows_LCK.swapaxes(0, 1)
        self.used += count
        if not one.decode:
            assert self.prompt + count == self.used, "a prompt's row behind a decoded one"
            self.prompt = self.used

    def add_details(self, one: RequestRows, tokens_T: np.ndarray, routing: StepRouting, step: int) -> None:
        """What a trace holds beside the experts of the rows that were added last."""
        rows, of_step = slice(self.used - (one.last - one.first), self.used), slice(one.first, one.last)
        self._weights_NLK[rows] = routing.weights_LTK[:, of_step].swapaxes(0, 1)
        self._token_N[rows] = tokens_T[of_step]
        self._step_N[rows] = step
        if self._lookahead_NLPC is not None:
            assert routing.lookahead_LTPC is not None
            self._lookahead_NLPC[rows] = routing.lookahead_LTPC[:, of_step].swapaxes(0, 1)

    def finished(self) -> _Finished:
        used = self.used
        weights_NLK = self._weights_NLK[:used]
        order_NLK = (-weights_NLK).argsort(axis=-1, kind="stable")
        lookahead_NLPC = self._lookahead_NLPC
        return _Finished(
            experts_NLK=np.take_along_axis(self.experts_NLK[:used], order_NLK, axis=-1),
            weights_NLK=quantised_weights(np.take_along_axis(weights_NLK, order_NLK, axis=-1)),
            token_N=self._token_N[:used].copy(),
            decode_N=np.arange(used) >= self.prompt,
            step_N=self._step_N[:used].copy(),
            lookahead_NPLC=None if lookahead_NLPC is None else lookahead_NLPC[:used].swapaxes(1, 2).copy(),
        )

    def _grow(self, needed: int) -> None:
        size = max(needed, 2 * len(self.experts_NLK))
        self.experts_NLK = _longer(self.experts_NLK, size)
        if len(self._token_N):
            self._weights_NLK = _longer(self._weights_NLK, size)
            self._token_N, self._step_N = _longer(self._token_N, size), _longer(self._step_N, size)
        if self._lookahead_NLPC is not None:
            self._lookahead_NLPC = _longer(self._lookahead_NLPC, size)


def quantised_weights(weights_NLK: np.ndarray) -> np.ndarray:
    """Weights as a trace holds them: uint8, 255 times the share of the row's sum. Rows of zeros share alike."""
    sums = weights_NLK.sum(axis=-1, keepdims=True, dtype=np.float64)
    alike = 1 / weights_NLK.shape[-1]
    shares_NLK = np.divide(weights_NLK, sums, out=np.full(weights_NLK.shape, alike), where=sums > 0)
    rounded_NLK: np.ndarray = np.rint(WEIGHT_SCALE * shares_NLK)
    return rounded_NLK.astype(np.uint8)


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    grown = np.empty((size, *array.shape[1:]), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
