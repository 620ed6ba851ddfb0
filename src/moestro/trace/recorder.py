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
        self._kind = np.uint8 if experts <= 256 else np.uint16
        self._steps = 0
        self._running: dict[int, _Rows] = {}
        self._ended: dict[int, _Rows] = {}
        self._meta: dict[int, dict[str, Any]] = {}

    def step(self, requests: Sequence[RequestRows], tokens_T: np.ndarray, routing: StepRouting) -> None:
        """A forward pass went through. `routing` may be overwritten afterwards, `tokens_T` not."""
        for one in requests:
            rows = self._running.get(one.request)
            if rows is None:
                rows = self._running[one.request] = _Rows()
            part = slice(one.first, one.last)
            rows.experts.append(routing.experts_LTK[:, part].astype(self._kind))
            if not one.decode:
                rows.prompt += one.last - one.first
            if self._keep:
                rows.weights.append(routing.weights_LTK[:, part].copy())
                rows.tokens.append((tokens_T[part], self._steps, one.decode))
                if routing.lookahead_LTPC is not None:
                    rows.lookahead.append(routing.lookahead_LTPC[:, part].astype(self._kind))
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
            self._collect(_joined(rows.experts), rows.prompt, self._collections)
        if self._keep:
            self._ended[request] = rows

    def trace(self) -> Trace:
        """All requests that have ended, in the order of their numbers. Raises TraceError when there is none."""
        assert self._keep
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

    def _collect(self, experts_NLK: np.ndarray, prompt: int, collections: CollectionFile) -> None:
        number = new_id()
        phases = (experts_NLK[:prompt], experts_NLK[prompt:])
        for collection, rows_NLK in zip((collections.prefill, collections.decode), phases, strict=True):
            if len(rows_NLK):
                collection.insert(eam_of_rows(rows_NLK, self._experts), id=number)


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

    `prompt`: how many rows are the prompt's.
    """

    __slots__ = ("experts", "lookahead", "prompt", "tokens", "weights")

    def __init__(self) -> None:
        self.prompt = 0
        self.experts: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.lookahead: list[np.ndarray] = []
        self.tokens: list[tuple[np.ndarray, int, bool]] = []

    def finished(self) -> _Finished:
        experts_NLK, weights_NLK = _joined(self.experts), _joined(self.weights)
        order_NLK = (-weights_NLK).argsort(axis=-1, kind="stable")
        tokens, steps, decode = zip(*self.tokens, strict=True)
        lengths = [len(one) for one in tokens]
        return _Finished(
            experts_NLK=np.take_along_axis(experts_NLK, order_NLK, axis=-1),
            weights_NLK=quantised_weights(np.take_along_axis(weights_NLK, order_NLK, axis=-1)),
            token_N=np.concatenate(tokens).astype(np.int32),
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
