"""Traces from and for elsewhere: what is only untidy is tidied, what is wrong is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import TraceError
from moestro.trace import Trace
from moestro.trace.exchange import export_parquet, import_trace
from traces import EXCERPT, assert_same, random_trace, traces


def saved_arrays(trace: Trace, folder: Path) -> dict[str, np.ndarray]:
    trace.save(folder / "tidy.npz")
    with np.load(folder / "tidy.npz") as archive:
        return dict(archive)


@given(trace=traces(), seed=st.integers(0, 2**32 - 1))
def test_an_untidy_trace_is_tidied(trace: Trace, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("untidy")
    rng = np.random.default_rng(seed)
    arrays = saved_arrays(trace, folder)
    shuffle_NLK = rng.random(trace.experts_NLK.shape).argsort(axis=-1)
    arrays["experts"] = np.take_along_axis(arrays["experts"], shuffle_NLK, axis=-1).astype(np.int64)
    arrays["weights"] = np.take_along_axis(arrays["weights"], shuffle_NLK, axis=-1).astype(np.float64) / 1000
    for key in ("token", "offsets", "step", "lookahead", "decode"):
        if key in arrays:
            arrays[key] = arrays[key].astype(np.int16)
    np.savez(folder / "untidy.npz", **arrays)
    found = import_trace(folder / "untidy.npz")
    ahead = 0 if trace.lookahead_NPLC is None else trace.lookahead_NPLC.max()
    assert found.experts_NLK.dtype == (np.uint8 if max(trace.experts_NLK.max(), ahead) < 256 else np.uint16)
    np.testing.assert_array_equal(np.sort(found.experts_NLK), np.sort(trace.experts_NLK))
    assert np.abs(found.weights_NLK.astype(int) - trace.weights_NLK).max() <= 1 + trace.picks // 2
    for name in ("token_N", "offsets_R1", "decode_N", "step_N", "lookahead_NPLC", "meta", "num_experts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trace, name))


def test_a_tidy_trace_stays_as_it_is() -> None:
    assert_same(import_trace(EXCERPT), Trace.load(EXCERPT))
    assert import_trace(EXCERPT, num_experts=32).num_experts == 32


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("experts", lambda array: array.astype(float), "experts is float64 of 3 dimensions, expected whole numbers"),
        ("experts", lambda array: array[0], "experts is uint8 of 2 dimensions"),
        ("experts", lambda array: array.astype(int) - 1, "experts has numbers from -1"),
        (
            "experts",
            lambda array: array.astype(int) * 10**4,
            "experts has numbers from 0 to 70000, expected 0 to 65535",
        ),
        ("token", lambda array: array.astype(np.int64) + 2**31, "token has numbers from"),
        ("weights", lambda array: array * np.nan, "weights have numbers that are negative or not finite"),
        ("weights", lambda array: -array.astype(int), "weights have numbers that are negative or not finite"),
        ("weights", lambda array: array[:-1], "weights are uint8"),
        ("weights", lambda array: array.astype(str), "weights are <U3"),
        ("offsets", lambda array: array + 1, "offsets go from 1"),
        ("decode", lambda array: array + 2, "decode is of type"),
        ("more", lambda _: np.zeros(1), "keys have more"),
    ],
)
def test_what_is_wrong_is_named(key: str, change: Callable[[Any], np.ndarray], message: str, tmp_path: Path) -> None:
    arrays = saved_arrays(random_trace(0, steps=True), tmp_path)
    arrays[key] = change(arrays.get(key))
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(TraceError, match=rf"wrong\.npz: {message}"):
        import_trace(tmp_path / "wrong.npz")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.npz cannot be read"):
        import_trace(tmp_path / "none.npz")


@given(trace=traces())
def test_parquet_holds_all(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("parquet") / "one.parquet"
    export_parquet(trace, path)
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"moestro"])
    assert facts == {
        "num_experts": trace.num_experts,
        "layers": trace.layers,
        "picks": trace.picks,
        "requests": list(trace.meta),
    }
    columns = table.to_pydict()
    assert columns["token"] == trace.token_N.tolist()
    assert columns["decode"] == trace.decode_N.tolist()
    assert np.bincount(columns["request"]).tolist() == np.diff(trace.offsets_R1).tolist()
    assert columns["experts"] == trace.experts_NLK.reshape(trace.rows, -1).tolist()
    assert columns["weights"] == trace.weights_NLK.reshape(trace.rows, -1).tolist()
    assert columns.get("step") == (None if trace.step_N is None else trace.step_N.tolist())
    ahead = trace.lookahead_NPLC
    assert columns.get("lookahead") == (None if ahead is None else ahead.reshape(trace.rows, -1).tolist())


def test_without_pyarrow_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TraceError, match=r"pip install moestro\[parquet\]"):
        export_parquet(random_trace(0), tmp_path / "one.parquet")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        export_parquet(random_trace(0), tmp_path / "missing" / "one.parquet")
