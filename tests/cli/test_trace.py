"""`moestro trace`: recorded, shown, exported and imported; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.running import assert_user_error, run, run_process
from moestro.trace import Trace
from traces import EXCERPT, assert_same, random_trace

WORDS = "A command that records a model reads text and says where each of its words went.\n" * 12
KEYS = {
    *("path", "requests", "rows", "layers", "experts", "picks", "lookahead"),
    *("prompt_rows", "decode_rows", "used", "repeated", "gini", "listed"),
}
"""Published: keys may be added here, never changed or taken away."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text(WORDS)
    return file


def test_prompts_are_answered_and_recorded(store: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Es war einmal")
    out = tmp_path / "trace.npz"
    result = run_process(
        *("trace", "record", store, "--memory", "100MiB", "--out", out, "--max-tokens", "4", "--max-sequences", "2"),
        *("--prompt", "def f(x):", "--prompt-file", tmp_path / "prompt.txt", "--lookahead", "1"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    trace = Trace.load(out)
    assert (trace.requests, trace.layers, trace.num_experts, trace.picks) == (2, 8, 32, 4)
    assert [one["dataset"] for one in trace.meta] == ["prompt", str(tmp_path / "prompt.txt")]
    assert int(trace.decode_N.sum()) == 6
    assert trace.lookahead_NPLC is not None
    assert f"note: {trace.rows} tokens of 2 request(s) are in {out}" in result.stderr


def test_a_text_is_followed(store: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    result = run(
        *("trace", "record", store, "--memory", "100MiB", "--out", out, "--text", text),
        *("--window", "32", "--text-tokens", "96", "--prompt-tokens", "8"),
    )
    assert result.exit_code == 0
    trace = Trace.load(out)
    assert (trace.requests, trace.rows, int(trace.decode_N.sum())) == (3, 96, 72)
    shown = run("trace", "show", out)
    assert "96" in shown.stdout
    assert "24 of prompts, 72 decoded" in shown.stdout
    assert shown.stdout.count(str(text)) == 3


def test_show_json_has_the_published_keys(tmp_path: Path) -> None:
    shown = json.loads(run("trace", "show", EXCERPT, "--json").stdout)
    assert shown.keys() == KEYS
    assert (shown["requests"], shown["rows"], shown["layers"], shown["experts"], shown["picks"]) == (6, 257, 24, 32, 4)
    assert len(shown["listed"]) == 6
    assert sum(one["decode_rows"] for one in shown["listed"]) == 257
    few = json.loads(run("trace", "show", EXCERPT, "--json", "--most", "2").stdout)
    assert few["listed"] == shown["listed"][:2]


def test_the_number_of_experts_can_be_told(tmp_path: Path) -> None:
    shown = json.loads(run("trace", "show", EXCERPT, "--json", "--experts", "32").stdout)
    assert shown["experts"] == 32
    assert_user_error(run("trace", "show", EXCERPT, "--experts", "16"), "num_experts", "16")


def test_pictures_of_all_and_of_each(tmp_path: Path) -> None:
    sizes = []
    for most in (1, 6):
        picture = tmp_path / f"{most}.png"
        result = run("trace", "show", EXCERPT, "--plot", picture, "--most", str(most))
        assert result.exit_code == 0
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[20:24], "big"))
    assert sizes[0] < sizes[1]


def test_requests_that_are_not_listed_are_said() -> None:
    result = run("trace", "show", EXCERPT, "--most", "2")
    assert "4 more request(s) are not listed" in result.stderr


def test_out_and_in_again(tmp_path: Path) -> None:
    trace = random_trace(0, ahead=1, steps=True)
    trace.save(tmp_path / "one.npz")
    for name in ("two.npz", "two.parquet"):
        assert run("trace", "export", tmp_path / "one.npz", "--out", tmp_path / name).exit_code == 0
        assert (tmp_path / name).stat().st_size > 0
    assert_same(Trace.load(tmp_path / "two.npz"), trace)
    with np.load(tmp_path / "two.npz") as archive:
        wide = {key: array.astype(np.int64) if array.dtype.kind in "iu" else array for key, array in archive.items()}
    np.savez(tmp_path / "wide.npz", **wide)
    assert run("trace", "import", tmp_path / "wide.npz", "--out", tmp_path / "three.npz").exit_code == 0
    found = Trace.load(tmp_path / "three.npz")
    np.testing.assert_array_equal(np.sort(found.experts_NLK), np.sort(trace.experts_NLK))


RECORD = ("trace", "record", "nothing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*RECORD, "--out", "x.npz"), ("--prompt", "--text")),
        ((*RECORD, "--out", "x.npz", "--prompt", "a", "--text", "{text}"), ("either",)),
        ((*RECORD, "--out", "x.npz", "--prompt", "a", "--window", "8"), ("--window", "Leave")),
        ((*RECORD, "--out", "x.npz", "--text", "{text}", "--max-tokens", "8"), ("sampling flags",)),
        ((*RECORD, "--out", "x.npz", "--text", "{text}", "--context", "8"), ("--context",)),
        ((*RECORD, "--out", "x.npz", "--prompt", ""), ("prompt is empty",)),
        ((*RECORD, "--out", "x.npz", "--prompt-file", "missing.txt"), ("missing.txt", "No such file")),
        ((*RECORD, "--out", "x.txt", "--prompt", "a"), ("x.txt", ".npz")),
        ((*RECORD, "--out", "missing/x.npz", "--prompt", "a"), ("missing/x.npz", "cannot be written")),
        ((*RECORD, "--out", "x.npz", "--prompt", "a"), ("nothing",)),
        (("trace", "show", "missing.npz"), ("missing.npz", "No such file")),
        (("trace", "show", "{text}"), ("words.txt", "not a whole npz file")),
        (("trace", "show", EXCERPT, "--plot", "x.gif"), ("x.gif", ".png")),
        (("trace", "export", EXCERPT, "--out", "x.csv"), ("x.csv", ".parquet")),
        (("trace", "import", "missing.npz", "--out", "x.npz"), ("missing.npz",)),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str | Path, ...],
    words: tuple[str, ...],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_user_error(run(*(str(one).format(text=text) for one in arguments)), *words)
    assert list(tmp_path.iterdir()) == [text]
