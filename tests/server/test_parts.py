"""Reasoning, text and calls are told apart however the text is cut; nothing is lost or told twice."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moestro.server.dialects import CALL, CALLED
from moestro.server.parts import THINK, THOUGHT, Kind, Marks, Splitter

ALL = Marks(reasoning=True, calls=True)
CALL_OF_F = CALL + '{"name": "f", "arguments": {"x": 1}}' + CALLED


def _split(pieces: list[str], marks: Marks) -> tuple[dict[Kind, str], list[dict[str, object]]]:
    splitter = Splitter(marks)
    parts = [part for piece in pieces for part in splitter.push(piece)] + list(splitter.finish())
    texts = {kind: "".join(part.text for part in parts if part.kind is kind) for kind in Kind}
    return texts, [part.call["function"] for part in parts if part.call is not None]


@given(
    pieces=st.lists(
        st.sampled_from([THINK, THOUGHT, CALL, CALLED, CALL_OF_F, "a", "<", "thi", "\n", "{}"]), max_size=9
    ),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_cuts_do_not_matter(pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    cut = [text[start:end] for start, end in pairwise(places)]
    assert _split(cut, ALL) == _split([text], ALL) == _split(list(text), ALL)


@given(text=st.text(alphabet="<>think/ol_ca{}", max_size=40))
def test_without_marks_text_is_text(text: str) -> None:
    assert _split(list(text), Marks()) == ({Kind.TEXT: text, Kind.REASONING: "", Kind.CALL: ""}, [])


def test_reasoning_then_text_then_calls() -> None:
    texts, calls = _split([f"{THINK}\nhm{THOUGHT}\n\nHello. {CALL_OF_F}\n{CALL_OF_F}"], ALL)
    assert texts == {Kind.TEXT: "Hello. ", Kind.REASONING: "hm", Kind.CALL: ""}
    assert calls == [{"name": "f", "arguments": json.dumps({"x": 1})}] * 2


def test_a_prompt_may_have_begun_the_reasoning() -> None:
    texts, _ = _split([f"hm{THOUGHT}yes"], Marks(reasoning=True, thinking=True))
    assert (texts[Kind.REASONING], texts[Kind.TEXT]) == ("hm", "yes")


def test_what_is_no_call_stays_text() -> None:
    for text in (f"{CALL}{{{CALLED}", f"{CALL}[1]{CALLED}", f'{CALL}{{"name": "f"'):
        texts, calls = _split([text], ALL)
        assert texts[Kind.TEXT] == text
        assert calls == []
