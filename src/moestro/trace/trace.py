"""A trace: which experts every token of many requests was routed to, in the order in which it happened.

Shapes: N rows (tokens) of all requests, L MoE layers, K experts per row, R requests, P layers ahead, C candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import TraceError
from moestro.trace.checks import Checks
from moestro.trace.npz import read_npz, write_npz

_KEYS = frozenset({"experts", "weights", "token", "offsets", "meta", "num_experts", "decode", "step", "lookahead"})
_IDS = (np.uint8, np.uint16)


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows `first` to `last` (not included) of a trace, which are of one request, went through in one forward pass."""

    request: int
    first: int
    last: int
    decode: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Routing of R requests, rows of request r being `offsets_R1[r]` to `offsets_R1[r + 1]`, prompt before answer.

    Attributes:
        experts_NLK: uint8 or uint16, in falling order of weight.
        weights_NLK: uint8, 255 times the router's weight, normalised over K.
        token_N: int32; equal numbers are equal tokens.
        offsets_R1: int64.
        meta: of each request; keys are free, such as "dataset", "category", "prompt_tokens".
        num_experts: of a layer (the most of any layer).
        decode_N: bool; False is a row of a prompt.
        step_N: int32; rows of a request with the same step went through in one forward pass. None: not known, taken as
            a prompt in one pass and every other row in one of its own.
        lookahead_NPLC: of the type of `experts_NLK`; [n, p - 1, l] are the likeliest experts of layer l + p, in falling
            order, if its gate is applied to the hidden state that the gate of layer l saw. Zeros where there is no
            layer l + p. None: not recorded.
        source: what errors call the trace.

    Raises:
        TraceError: an array of wrong type or shape, or with values that cannot be; the message names it.
    """

    experts_NLK: np.ndarray
    weights_NLK: np.ndarray
    token_N: np.ndarray
    offsets_R1: np.ndarray
    meta: tuple[dict[str, Any], ...]
    num_experts: int
    decode_N: np.ndarray
    step_N: np.ndarray | None = None
    lookahead_NPLC: np.ndarray | None = None
    source: str = "The trace"

    def __post_init__(self) -> None:
        checks = Checks(self.source)
        checks.num_experts(self.num_experts)
        checks.array("experts", self.experts_NLK, _IDS, (-1, -1, -1))
        rows, layers, picks = self.experts_NLK.shape
        checks.array("weights", self.weights_NLK, (np.uint8,), (rows, layers, picks))
        checks.array("token", self.token_N, (np.int32,), (rows,))
        checks.array("decode", self.decode_N, (np.bool_,), (rows,))
        checks.array("offsets", self.offsets_R1, (np.int64,), (-1,))
        checks.offsets(self.offsets_R1, rows)
        if len(self.meta) != self.requests or not all(isinstance(one, dict) for one in self.meta):
            raise checks.fail("meta", f"has {len(self.meta)} entries, expected {self.requests} objects, one a request.")
        checks.ids("experts", self.experts_NLK, self.num_experts)
        checks.weights(self.weights_NLK)
        checks.prompt_first(self.decode_N, self.offsets_R1)
        if self.step_N is not None:
            checks.array("step", self.step_N, (np.int32,), (rows,))
            checks.steps(self.step_N, self.decode_N, self.offsets_R1)
        if self.lookahead_NPLC is not None:
            checks.array("lookahead", self.lookahead_NPLC, (self.experts_NLK.dtype.type,), (rows, -1, layers, -1))
            checks.lookahead(self.lookahead_NPLC, self.num_experts)

    @property
    def requests(self) -> int:
        return len(self.offsets_R1) - 1

    @property
    def rows(self) -> int:
        return len(self.experts_NLK)

    @property
    def layers(self) -> int:
        return int(self.experts_NLK.shape[1])

    @property
    def picks(self) -> int:
        """Experts per row."""
        return int(self.experts_NLK.shape[2])

    def rows_of(self, request: int) -> slice:
        """The rows of a request."""
        return slice(int(self.offsets_R1[request]), int(self.offsets_R1[request + 1]))

    def passes(self, request: int) -> Iterator[Pass]:
        """The forward passes of a request, in order."""
        rows = self.rows_of(request)
        decode = self.decode_N[rows]
        if self.step_N is None:
            ends = np.flatnonzero(decode | np.append(decode[1:], True)) + 1
        else:
            ends = np.flatnonzero(np.append(np.diff(self.step_N[rows]) != 0, True)) + 1
        first = rows.start
        for end in (ends + rows.start).tolist():
            yield Pass(request, first, end, bool(self.decode_N[first]))
            first = end

    def select(self, requests: Sequence[int] | np.ndarray) -> Trace:
        """A trace of these requests in this order. Raises TraceError for none, or one that is not there."""
        numbers = [int(one) for one in requests]
        if not numbers or not all(0 <= one < self.requests for one in numbers):
            raise TraceError(f"{self.source} has requests 0 to {self.requests - 1}; asked for were {_some(numbers)}.")
        lengths = np.diff(self.offsets_R1)[numbers]
        rows = np.concatenate([np.arange(*self.offsets_R1[[one, one + 1]]) for one in numbers])
        return Trace(
            experts_NLK=self.experts_NLK[rows],
            weights_NLK=self.weights_NLK[rows],
            token_N=self.token_N[rows],
            offsets_R1=np.concatenate([[0], np.cumsum(lengths)]),
            meta=tuple(self.meta[one] for one in numbers),
            num_experts=self.num_experts,
            decode_N=self.decode_N[rows],
            step_N=None if self.step_N is None else self.step_N[rows],
            lookahead_NPLC=None if self.lookahead_NPLC is None else self.lookahead_NPLC[rows],
            source=self.source,
        )

    @classmethod
    def load(cls, path: Path | str, *, num_experts: int | None = None) -> Trace:
        """Read an npz file. `num_experts` is for files that do not say it (else: the largest id plus one).

        Raises:
            TraceError: the file is missing, damaged or not a trace; the message names file and key.
        """
        path = Path(path)
        try:
            arrays = read_npz(path)
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror or error}. Check the name.") from error
        return trace_of_arrays(arrays, source=str(path), num_experts=num_experts)

    def save(self, path: Path | str) -> None:
        """Write an npz file, whole or not at all. Raises TraceError when it cannot be written."""
        arrays = {
            "experts": self.experts_NLK,
            "weights": self.weights_NLK,
            "token": self.token_N,
            "offsets": self.offsets_R1,
            "meta": np.array(json.dumps(self.meta)),
            "num_experts": np.array(self.num_experts),
            "decode": self.decode_N,
            "step": self.step_N,
            "lookahead": self.lookahead_NPLC,
        }
        try:
            write_npz(Path(path), {key: array for key, array in arrays.items() if array is not None})
        except OSError as error:
            raise TraceError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error


def trace_of_arrays(arrays: dict[str, np.ndarray], *, source: str, num_experts: int | None = None) -> Trace:
    """A trace of the arrays of an npz file, by key. Arguments and errors as `Trace.load`."""
    checks = Checks(source)
    _check_keys(arrays, checks)
    experts_NLK = arrays["experts"]
    offsets_R1 = arrays["offsets"]
    # Files of others have offsets in int32.
    checks.array("offsets", offsets_R1, (np.int64, np.int32), (-1,))
    checks.array("experts", experts_NLK, _IDS, (-1, -1, -1))
    decode_N = arrays.get("decode")
    return Trace(
        experts_NLK=experts_NLK,
        weights_NLK=arrays["weights"],
        token_N=arrays["token"],
        offsets_R1=offsets_R1.astype(np.int64),
        meta=_read_meta(arrays["meta"], checks),
        num_experts=_num_experts(arrays, checks, num_experts),
        decode_N=np.ones(len(experts_NLK), dtype=bool) if decode_N is None else decode_N,
        step_N=arrays.get("step"),
        lookahead_NPLC=arrays.get("lookahead"),
        source=source,
    )


def _check_keys(arrays: dict[str, np.ndarray], checks: Checks) -> None:
    missing = {"experts", "weights", "token", "offsets", "meta"} - arrays.keys()
    if missing:
        raise checks.fail("keys", f"are {_some(sorted(arrays))}: missing {_some(sorted(missing))}.")
    unknown = arrays.keys() - _KEYS
    if unknown:
        raise checks.fail("keys", f"have {_some(sorted(unknown))}, expected of {_some(sorted(_KEYS))} only.")


def _read_meta(array: np.ndarray, checks: Checks) -> tuple[dict[str, Any], ...]:
    checks.array("meta", array, (np.str_,), ())
    try:
        found = json.loads(str(array))
    except (json.JSONDecodeError, RecursionError, UnicodeError) as error:
        raise checks.fail("meta", f"is not JSON ({error}), expected a list of objects.") from error
    if not isinstance(found, list):
        raise checks.fail("meta", f"is a {type(found).__name__} in JSON, expected a list of objects.")
    return tuple(found)


def _num_experts(arrays: dict[str, np.ndarray], checks: Checks, told: int | None) -> int:
    array = arrays.get("num_experts")
    if array is None:
        return int(arrays["experts"].max()) + 1 if told is None else told
    if array.shape != () or array.dtype.kind not in "iu":
        raise checks.fail("num_experts", f"is {array.dtype} {list(array.shape)}, expected a single whole number.")
    found = int(array)
    if told not in (None, found):
        raise checks.fail("num_experts", f"is {found}, but {told} was asked for.")
    return found


def _some(things: Sequence[object]) -> str:
    """The first few, for an error."""
    return ", ".join(str(one) for one in things[:12]) + (" ..." if len(things) > 12 else "") or "none"
