"""Files of example prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.domain import read_examples
from moestro.domain.examples import _cut
from moestro.errors import RouteError


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        "one",
        {"prompt": "two"},
        {"text": "three", "id": 3},
        {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "four"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "five"}]}]},
    ]
    file = tmp_path / "some.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    assert read_examples(file) == ["one", "two", "three", "four", "five"]
    assert read_examples(file, most=1) == ["three"]
    assert read_examples(file, most=0) == read_examples(file)


@pytest.mark.parametrize("line", ["{", "3", "{}", '{"prompt": 3}', '{"messages": "hello"}', "[" * 5000])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('"good"\n' + line)
    with pytest.raises(RouteError, match=r"Line 2 of .*some\.jsonl"):
        read_examples(file)


def test_a_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("A line of some length.\n" * 200 + "\f\nThe next document.\n")
    found = read_examples(file, most=0)
    assert "".join(found) == file.read_text().replace("\f", "")
    assert all(one.endswith("\n") for one in found)
    assert max(map(len, found)) < 1100
    assert len(read_examples(file, most=3)) == 3


@given(st.text(max_size=50), st.integers(1, 100))
def test_nothing_is_lost_in_cutting(text: str, times: int) -> None:
    whole = text * times
    assert "".join(_cut(whole)) == whole.replace("\f", "")
    assert all(len(one) < 2000 for one in _cut(whole))


def test_files_that_hold_no_prompt(tmp_path: Path) -> None:
    for name, content in (("a.txt", b" \n"), ("b.jsonl", b"\n"), ("c.txt", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RouteError, match=name):
            read_examples(tmp_path / name)
    with pytest.raises(RouteError, match="cannot be read"):
        read_examples(tmp_path / "missing.txt")
