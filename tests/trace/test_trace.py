"""Traces: what goes in comes out, and whatever is wrong with one is refused by name."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import TraceError
from moestro.trace import Trace
from traces import EXCERPT, arrays_of, assert_same, random_trace, traces

Arrays = dict[str, np.ndarray]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A trace with everything in it."""
    path = tmp_path / "one.npz"
    random_trace(0, ahead=2, steps=True).save(path)
    return path


def change(file: Path, edit: Callable[[Arrays], Any]) -> Path:
    """Write the file anew with other arrays."""
    with np.load(file) as archive:
        arrays = dict(archive)
    edit(arrays)
    np.savez_compressed(file, **arrays)
    return file


@given(trace=traces())
def test_what_is_saved_is_loaded(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "one.npz"
    trace.save(path)
    assert_same(Trace.load(path), trace)
    assert [one.name for one in path.parent.iterdir()] == ["one.npz"]


def test_equal_traces_make_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        random_trace(7, ahead=1).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_published_format_is_read() -> None:
    trace = Trace.load(EXCERPT)
    assert (trace.requests, trace.rows, trace.layers, trace.picks, trace.num_experts) == (6, 257, 24, 4, 32)
    assert trace.decode_N.all()
    assert {one["dataset"] for one in trace.meta} >= {"mmlu_test", "sorry_bench_base"}
    # Neighbouring tokens share experts, which random ids would not: a quarter of them at most would be the same.
    experts_NLK = trace.experts_NLK[trace.rows_of(0)]
    same = (experts_NLK[1:, :, :, None] == experts_NLK[:-1, :, None, :]).any(axis=-1).mean()
    assert same > 0.3


def test_numpy_reads_what_is_saved(file: Path) -> None:
    trace = Trace.load(file)
    with np.load(file, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["experts"], trace.experts_NLK)
        assert json.loads(str(archive["meta"])) == list(trace.meta)


def test_offsets_of_others_and_what_they_leave_out(file: Path) -> None:
    trace = Trace.load(file)

    def edit(arrays: Arrays) -> None:
        arrays["offsets"] = arrays["offsets"].astype(np.int32)
        for key in ("num_experts", "decode", "step", "lookahead"):
            del arrays[key]

    read = Trace.load(change(file, edit))
    assert read.offsets_R1.dtype == np.int64
    assert read.num_experts == trace.experts_NLK.max() + 1
    assert (read.decode_N.all(), read.step_N, read.lookahead_NPLC) == (True, None, None)
    assert Trace.load(file, num_experts=99).num_experts == 99


@given(trace=traces(), data=st.data())
def test_a_selection_is_its_requests(trace: Trace, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, trace.requests - 1), min_size=1, max_size=6))
    chosen = trace.select(numbers)
    for place, number in enumerate(numbers):
        assert chosen.meta[place] == trace.meta[number]
        assert_same(chosen.select([place]), trace.select([number]))
        np.testing.assert_array_equal(
            chosen.experts_NLK[chosen.rows_of(place)], trace.experts_NLK[trace.rows_of(number)]
        )


@pytest.mark.parametrize("numbers", [[], [3], [-1], [0, 1, 99]])
def test_a_selection_of_what_is_not_there_is_refused(numbers: list[int]) -> None:
    with pytest.raises(TraceError, match="requests 0 to 2"):
        random_trace(0).select(numbers)


@given(trace=traces())
def test_passes_cover_each_row_once(trace: Trace) -> None:
    for request in range(trace.requests):
        passes = list(trace.passes(request))
        rows = trace.rows_of(request)
        assert [row for one in passes for row in range(one.first, one.last)] == list(range(rows.start, rows.stop))
        for one in passes:
            assert set(trace.decode_N[one.first : one.last]) == {one.decode}
            if trace.step_N is not None:
                assert len(set(trace.step_N[one.first : one.last])) == 1
        if trace.step_N is None:
            assert all(one.last - one.first == 1 for one in passes if one.decode)
            assert sum(not one.decode for one in passes) <= 1
        else:
            assert len(passes) == len(set(trace.step_N[rows]))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.npz cannot be read: No such file"):
        Trace.load(tmp_path / "none.npz")
    with pytest.raises(TraceError, match="Is a directory"):
        Trace.load(tmp_path)
    with pytest.raises(TraceError, match=r"nowhere.*cannot be written"):
        random_trace(0).save(tmp_path / "nowhere" / "one.npz")


@pytest.mark.parametrize("content", [b"", b"words", b"PK\3\4" + bytes(100)])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "one.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"one\.npz is not a whole npz file"):
        Trace.load(path)


_FILE = EXCERPT.read_bytes()


@given(length=st.integers(0, len(_FILE) - 1))
def test_a_file_that_was_cut_is_named(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "one.npz"
    path.write_bytes(_FILE[:length])
    with pytest.raises(TraceError, match=r"one\.npz"):
        Trace.load(path)


@given(place=st.integers(0, len(_FILE) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_named_or_does_no_harm(place: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("flipped") / "one.npz"
    damaged = bytearray(_FILE)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        read = Trace.load(path)
    except TraceError as error:
        assert "one.npz" in str(error)  # noqa: PT017
    else:
        assert_same(read, Trace.load(EXCERPT))  # dates and the like


def test_objects_are_refused_not_unpickled(file: Path, tmp_path: Path) -> None:
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays["token"] = np.array([{}] * len(arrays["token"]), dtype=object)
    np.savez(file, **arrays)
    with pytest.raises(TraceError, match=r"one\.npz: token holds Python objects"):
        Trace.load(file)


def test_a_header_that_promises_more_than_is_there_is_refused(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    shape = b"(14, 3, 2)"
    promise = b"(1000000000000000, 3, 2)"
    longer = members["experts.npy"].replace(shape, promise)
    members["experts.npy"] = longer.replace(b" " * (len(promise) - len(shape)), b"", 1)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(TraceError, match=rf"experts has \d+ bytes, expected {6 * 10**15}"):
        Trace.load(file)


def _set(key: str, place: Any, value: Any) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        arrays[key] = arrays[key].copy()
        arrays[key][place] = value

    return edit


def _cast(key: str, kind: type) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({key: arrays[key].astype(kind)})


def _cut(key: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({key: arrays[key][:-1]})


def _put(key: str, value: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({key: np.array(value)})


# The trace: requests of (prompt, answer) rows (3, 4), (0, 2), (5, 0); 3 layers, 2 of 8 experts, 4 candidates.
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda arrays: arrays.pop("weights"), "missing weights"),
        (lambda arrays: arrays.pop("meta"), "missing meta"),
        (_put("loookahead", 0), "keys have loookahead"),
        (_cast("experts", np.int64), "experts is of type int64, expected uint8 or uint16"),
        (_cast("weights", np.float32), "weights is of type float32"),
        (_cast("token", np.int64), "token is of type int64"),
        (_cast("offsets", np.float64), "offsets is of type float64, expected int64 or int32"),
        (_cast("decode", np.uint8), "decode is of type uint8, expected bool"),
        (_cast("step", np.int64), "step is of type int64"),
        (_cast("lookahead", np.uint16), "lookahead is of type uint16, expected uint8"),
        (_put("num_experts", 8.0), "num_experts is float64"),
        (_put("num_experts", [8]), r"num_experts is int64 \[1\]"),
        (_put("num_experts", 0), "num_experts is 0, expected 1 to 65536"),
        (_put("num_experts", 70000), "num_experts is 70000"),
        (_put("experts", np.zeros((14, 3), np.uint8)), r"experts has the shape \[14, 3\], expected \[any, any, any\]"),
        (_put("experts", np.zeros((0, 3, 2), np.uint8)), r"experts has the shape \[0, 3, 2\]"),
        (_cut("experts"), r"weights has the shape \[14, 3, 2\], expected \[13, 3, 2\]"),
        (_cut("weights"), r"weights has the shape \[13, 3, 2\], expected \[14, 3, 2\]"),
        (_cut("token"), r"token has the shape \[13\], expected \[14\]"),
        (_cut("decode"), r"decode has the shape \[13\]"),
        (_cut("step"), r"step has the shape \[13\]"),
        (_cut("lookahead"), r"lookahead has the shape"),
        (_cut("offsets"), "offsets go from 0 to 9, expected 0 to 14"),
        (_set("offsets", 0, 1), "offsets go from 1 to 14"),
        (_set("offsets", 2, 7), "offsets give request 1 0 rows"),
        (_set("offsets", 2, 3), "offsets give request 1 -4 rows"),
        (_set("experts", (13, 2, 1), 8), "experts has expert 8, expected ids below num_experts = 8"),
        (_set("experts", (5, 2), 3), "experts has an expert twice in row 5, layer 2"),
        (_set("weights", (4, 1), [100, 155]), "weights rise in row 4, layer 1"),
        (_set("weights", (4, 1), [250, 2]), "weights add up to 252 in row 4, layer 1, expected 255"),
        (_set("weights", (4, 1), 0), "weights add up to 0"),
        (_set("decode", 1, True), r"decode has a row of the prompt behind decoded ones \(row 2\)"),
        (_set("step", 1, 99), "step falls from 99 to .* at row 2"),
        (_set("step", slice(0, 7), 0), r"step 0 has rows of prompt and answer \(row 3\)"),
        (_set("lookahead", (2, 0, 1), 5), "lookahead has an expert twice in row 2, layer 1"),
        (_set("lookahead", (2, 0, 1, 0), 9), "lookahead has expert 9"),
        (_set("lookahead", (2, 0, 2, 0), 1), "lookahead has ids for a layer past the last of 3"),
        (_put("meta", 5), "meta is of type int64"),
        (_put("meta", "not JSON"), "meta is not JSON"),
        (_put("meta", "{}"), "meta is a dict in JSON"),
        (_put("meta", "[{}]"), "meta has 1 entries, expected 3"),
        (_put("meta", "[1, 2, 3]"), "expected 3 objects"),
        (_put("meta", ["[]"]), r"meta has the shape \[1\]"),
    ],
)
def test_what_is_wrong_is_named(file: Path, edit: Callable[[Arrays], Any], message: str) -> None:
    Trace.load(file)
    with pytest.raises(TraceError, match=rf"^{re.escape(str(change(file, edit)))}: .*{message}"):
        Trace.load(file)


def test_a_count_of_experts_that_is_not_the_files_is_refused(file: Path) -> None:
    with pytest.raises(TraceError, match="num_experts is 8, but 9 was asked for"):
        Trace.load(file, num_experts=9)


def test_a_trace_that_was_not_loaded_is_checked_too() -> None:
    arrays = arrays_of(random_trace(0))
    with pytest.raises(TraceError, match="The trace: token is of type float64"):
        Trace(**{**arrays, "token_N": arrays["token_N"].astype(float)})
