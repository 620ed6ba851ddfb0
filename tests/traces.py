"""Small traces for tests: made by hypothesis, and six real requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moestro.trace import Trace

EXCERPT = Path(__file__).parent / "data" / "gpt-oss-20b-excerpt.npz"
"""24 layers, top 4 of 32 experts; six requests, 257 decoded rows; see its folder's README."""


def random_trace(
    seed: int,
    *,
    prompts: tuple[int, ...] = (3, 0, 5),
    answers: tuple[int, ...] = (4, 2, 0),
    layers: int = 3,
    experts: int = 8,
    picks: int = 2,
    ahead: int = 0,
    steps: bool = False,
) -> Trace:
    """Requests of `prompts[r]` prompt rows and `answers[r]` decoded ones, routed at random."""
    rng = np.random.default_rng(seed)
    lengths = np.add(prompts, answers)
    rows = int(lengths.sum())
    kind = np.uint8 if experts <= 256 else np.uint16
    offsets_R1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    decode_N = np.concatenate([np.repeat([False, True], pair) for pair in zip(prompts, answers, strict=True)])
    return Trace(
        experts_NLK=_ids(rng, (rows, layers), experts, picks).astype(kind),
        weights_NLK=_weights(rng, (rows, layers), picks),
        token_N=rng.integers(0, 100, rows, dtype=np.int32),
        offsets_R1=offsets_R1,
        meta=tuple({"number": number} for number in range(len(prompts))),
        num_experts=experts,
        decode_N=decode_N,
        step_N=_steps(rng, decode_N) if steps else None,
        lookahead_NPLC=_lookahead(rng, rows, layers, experts, min(2 * picks, experts), ahead, kind) if ahead else None,
    )


def _ids(rng: np.random.Generator, shape: tuple[int, ...], experts: int, picks: int) -> np.ndarray:
    return rng.random((*shape, experts)).argsort(axis=-1)[..., :picks]


def _weights(rng: np.random.Generator, shape: tuple[int, ...], picks: int) -> np.ndarray:
    shares = rng.random((*shape, picks)) + 0.01
    return -np.sort(-np.rint(255 * shares / shares.sum(axis=-1, keepdims=True)).astype(int)).astype(np.uint8)


def _steps(rng: np.random.Generator, decode_N: np.ndarray) -> np.ndarray:
    """Decoded rows one by one, a prompt's in random pieces; numbers go on from request to request."""
    ends = rng.random(len(decode_N)) < 0.5
    first = np.append(True, decode_N[1:] | decode_N[:-1] | ends[1:])
    return np.cumsum(first).astype(np.int32)


def _lookahead(
    rng: np.random.Generator, rows: int, layers: int, experts: int, candidates: int, ahead: int, kind: type
) -> np.ndarray:
    ids = _ids(rng, (rows, ahead, layers), experts, candidates).astype(kind)
    for distance in range(1, ahead + 1):
        ids[:, distance - 1, max(0, layers - distance) :] = 0
    return ids


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Traces of every shape, with and without what is optional."""
    requests = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any), min_size=1, max_size=4))
    experts = draw(st.sampled_from([1, 2, 7, 256, 300]))
    return random_trace(
        draw(st.integers(0, 2**32 - 1)),
        prompts=tuple(prompt for prompt, _ in requests),
        answers=tuple(answer for _, answer in requests),
        layers=draw(st.integers(1, 4)),
        experts=experts,
        picks=draw(st.integers(1, min(4, experts))),
        ahead=draw(st.integers(0, 3)),
        steps=draw(st.booleans()),
    )


def arrays_of(trace: Trace) -> dict[str, Any]:
    """What distinguishes a trace, for comparison."""
    return {key: value for key, value in vars(trace).items() if key != "source"}


def assert_same(found: Trace, expected: Trace) -> None:
    for key, value in arrays_of(expected).items():
        other = getattr(found, key)
        assert type(other) is type(value), key
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype, key
        np.testing.assert_array_equal(other, value, err_msg=key)
