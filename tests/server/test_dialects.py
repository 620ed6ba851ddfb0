"""Each family's way to write calls is understood, however the text is cut; what is none of it stays text."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.config import TOOL_PARSERS, ServeOptions
from moestro.errors import ServeError
from moestro.server.dialects import BEGIN, BLOCK, BLOCK_END, DIALECTS, END, SEPARATOR, find_dialect
from moestro.server.parts import THINK, THOUGHT, Kind, Marks
from moestro.server.tools import splitter_of

SCHEMAS = {
    "f": {"type": "object", "properties": {"x": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}}}
}
ONE = {"name": "f", "arguments": {"x": 1}}
LLAMA = {"name": "f", "parameters": {"x": 1}}
HARMONY_CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"

WRITTEN = {
    "hermes": [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', 1),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n' * 2, 2),
    ],
    "qwen3_coder": [
        ("<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>", 1),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 1}}]', 2),
        ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{"x": 1}', 2),
        ('[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": 1}', 1),
        ('[TOOL_CALLS]f{"x": 1}', 1),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"x": 1}}', 1),
        ('\n<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 1}}', 2),
    ],
    "harmony": [
        (HARMONY_CALL + '{"x": 1}', 1),
        (HARMONY_CALL + '{"x": 1}<|call|><|start|>assistant' + HARMONY_CALL + '{"x": 1}', 2),
        ('<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}', 1),
    ],
    "deepseek_v3": [
        (f'{BLOCK}{BEGIN}function{SEPARATOR}f\n```json\n{{"x": 1}}\n```{END}\n{BEGIN}f{SEPARATOR}{{"x": 1}}{END}'
         f"{BLOCK_END}", 2),
    ],
}  # fmt: skip
FRAGMENTS = [
    "a", "<", "{", "}", "[", "]", "\n", " ", "f", "tool", "<|", "|>", '"name"', THINK, THOUGHT, "{}", ";",
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "[TOOL_CALLS]",
    "[ARGS]", "<|python_tag|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "analysis",
    " to=functions.f", BLOCK, BLOCK_END, BEGIN, END, SEPARATOR, json.dumps(ONE), json.dumps(LLAMA), json.dumps([ONE]),
    *(text for texts in WRITTEN.values() for text, _ in texts),
]  # fmt: skip


def _split(pieces: list[str], name: str, *, calls: bool = True) -> tuple[dict[Kind, str], list[dict[str, Any]]]:
    splitter = splitter_of(Marks(reasoning=True, calls=calls, dialect=DIALECTS[name], schemas=SCHEMAS))
    parts = [part for piece in pieces for part in splitter.push(piece)] + list(splitter.finish())
    texts = {kind: "".join(part.text for part in parts if part.kind is kind) for kind in Kind}
    found = [part.call for part in parts if part.call is not None]
    assert [one["index"] for one in found] == list(range(len(found)))
    assert splitter.has_calls is bool(found)
    return texts, [one["function"] for one in found]


def test_every_dialect_is_tested() -> None:
    assert WRITTEN.keys() == DIALECTS.keys() == set(TOOL_PARSERS)
    with pytest.raises(ServeError, match="qwen3_coder"):
        ServeOptions(tool_parser="hermet")


@pytest.mark.parametrize(("name", "text", "count"), [(name, *one) for name, all_ in WRITTEN.items() for one in all_])
def test_calls_are_understood(name: str, text: str, count: int) -> None:
    for pieces in ([text], list(text)):
        texts, calls = _split(pieces, name)
        assert [(one["name"], json.loads(one["arguments"])) for one in calls] == [("f", {"x": 1})] * count
        assert not "".join(texts.values()).strip()


@pytest.mark.parametrize("name", TOOL_PARSERS)
@given(
    pieces=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=9),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    calls=st.booleans(),
)
def test_cuts_do_not_matter_and_nothing_is_an_exception(
    name: str, pieces: list[str], cuts: list[int], calls: bool
) -> None:
    text = "".join(pieces)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    whole = _split([text], name, calls=calls)
    assert _split([text[start:end] for start, end in pairwise(places)], name, calls=calls) == whole
    assert _split(list(text), name, calls=calls) == whole
    if not calls:
        assert not whole[1]


@pytest.mark.parametrize("name", TOOL_PARSERS)
@given(damage=st.integers(0, 400), drop=st.integers(1, 30))
def test_a_damaged_call_is_told_as_it_was_written(name: str, damage: int, drop: int) -> None:
    text, count = WRITTEN[name][0]
    place = damage % len(text)
    damaged = text[:place] + text[place + drop :]
    texts, calls = _split([damaged], name)
    if not calls and name != "harmony":
        assert texts[Kind.TEXT] == damaged
    elif len(calls) == count:
        assert all(isinstance(json.loads(one["arguments"]), dict) for one in calls)


def test_values_have_the_types_of_the_schema() -> None:
    text = (
        "Now:\n<tool_call>\n<function=f>\n<parameter=s>\n12\n</parameter>\n<parameter=l>\n[1,\n2]\n</parameter>\n"
        "<parameter=x>\nmany\n</parameter>\n<parameter=other>\n<b>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    texts, (call,) = _split([text], "qwen3_coder")
    assert texts[Kind.TEXT] == "Now:\n"
    assert json.loads(call["arguments"]) == {"s": "12", "l": [1, 2], "x": "many", "other": "<b>\n3"}


def test_channels_are_told_apart() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant" + HARMONY_CALL + '{"x": 1}'
    )
    texts, calls = _split([text], "harmony")
    assert (texts[Kind.REASONING], texts[Kind.TEXT], len(calls)) == ("Hm.", "I look.", 1)
    final = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert _split([final], "harmony", calls=False)[0] == {Kind.REASONING: "Hm.", Kind.TEXT: "Yes.", Kind.CALL: ""}
    assert _split(['{"a": 1}'], "harmony")[0][Kind.TEXT] == '{"a": 1}'


def test_llama_calls_only_where_an_answer_begins() -> None:
    text = 'So: {"name": "f", "parameters": {"x": 1}}'
    texts, calls = _split([text], "llama3_json")
    assert (texts[Kind.TEXT], calls) == (text, [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }} <tool_call>{\"name\": <function-name>}</tool_call>", "hermes"),
        ("{{ tools }} <tool_call>\n<function=example>", "qwen3_coder"),
        ("{{ tools }} [AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ('{{ tools }} {"name": function name, "parameters": dictionary of argument name}', "llama3_json"),
        ("<|start|>assistant<|channel|>analysis<|message|> {{ tools }}", "harmony"),
        ("{{ tools }}" + BLOCK, "deepseek_v3"),
        ("{{ tools }} <tool_call>f<arg_key>", None),
        ("{{ messages }}", None),
    ],
)  # fmt: skip
def test_dialects_are_found_by_templates(template: str, name: str | None) -> None:
    found = find_dialect("auto", template)
    assert (found and found.name) == name
    assert find_dialect("mistral", template) is DIALECTS["mistral"]
