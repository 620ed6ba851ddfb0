"""Structured output: whatever the model would like to say, the answer is of the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moestro import LLM, SamplingParams
from moestro.config import Guide
from moestro.errors import RequestError

PROMPT = "def main(argv):\n    "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["file", "folder"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, memory="64MiB", context=256, max_sequences=8, guides=True) as opened:
        yield opened


def _answers(llm: LLM, guide: object, count: int = 4, **more: Any) -> list[str]:
    params = [
        SamplingParams(max_tokens=240, temperature=0.7, seed=seed, guide=guide, **more)  # type: ignore[arg-type]
        for seed in range(count)
    ]
    done = llm.generate([PROMPT] * count, params)
    assert [one.finish_reason for one in done] == ["stop"] * count
    return [one.text for one in done]


def test_a_json_schema_is_followed(llm: LLM) -> None:
    for text in _answers(llm, {"json_schema": SCHEMA}):
        found = json.loads(text)
        assert list(found) == ["name", "size", "kind", "tags"]
        assert len(found["name"]) <= 12
        assert 0 <= found["size"] <= 99
        assert found["kind"] in ("file", "folder")
        assert len(found["tags"]) <= 3
        assert all(isinstance(one, bool) for one in found["tags"])


def test_an_expression_is_followed_to_its_end_and_no_further(llm: LLM) -> None:
    expression = r"[A-Z][a-z]{2,8} is (red|blau|この色), [0-9]{3}\."
    for text in _answers(llm, {"regex": expression}, ignore_eos=True):
        assert re.fullmatch(expression, text)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum ";"\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[1-9][0-9]?/\n',
        'root ::= sum ";"\nsum ::= number | number "+" sum\nnumber ::= [1-9] [0-9]?\n',
    ],
)
def test_grammars_of_lark_and_of_llama_cpp_are_followed(llm: LLM, grammar: str) -> None:
    for text in _answers(llm, {"grammar": grammar}, logit_bias={26: 8.0}):
        assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)*;", text)


def test_any_json_object(llm: LLM) -> None:
    done = llm.generate(PROMPT, SamplingParams(max_tokens=120, guide=Guide("json_object"), logit_bias={94: 3.0}))[0]
    if done.finish_reason == "stop":
        assert isinstance(json.loads(done.text), dict)
    assert done.text.lstrip().startswith("{")


def test_neighbours_change_nothing(llm: LLM) -> None:
    guided = SamplingParams(max_tokens=60, temperature=0.8, seed=4, guide=Guide("json_schema", json.dumps(SCHEMA)))
    alone = llm.generate(PROMPT, guided)[0]
    plain = SamplingParams(max_tokens=60, temperature=0.8, seed=5)
    among = llm.generate([PROMPT] * 5, [plain, plain, guided, guided, plain])
    assert among[2].token_ids == among[3].token_ids == alone.token_ids
    assert among[0].token_ids == among[4].token_ids == llm.generate(PROMPT, plain)[0].token_ids


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        ({"json_schema": {"type": "banana"}}, "JSON schema .* banana"),
        ({"json_schema": {"not": {"type": "string"}}}, "JSON schema .* not"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "Unsatisfiable"),
        ({"json_schema": "no schema"}, "JSON schema"),
        ({"regex": "(a"}, "regular expression .* unclosed group"),
        ({"grammar": "start: nothing_known"}, "grammar .* nothing_known"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_request_starts(
    llm: LLM, guide: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        llm.prepare([5], SamplingParams(guide=guide))  # type: ignore[arg-type]
    assert str(refusal.value).startswith("guide: ")
    assert "\n" not in str(refusal.value)


def test_a_guide_that_becomes_too_complex_ends_its_request_alone(llm: LLM) -> None:
    """What a matcher does after a token that it does not know how to go on from."""
    sampling = SamplingParams(max_tokens=30, guide=Guide("regex", "[a-z]+"), ignore_eos=True)
    broken, whole = [llm.prepare(llm.encode(PROMPT), sampling) for _ in range(2)]
    constraint = broken.sequence.sampler._constraint
    assert constraint is not None
    constraint.take(3)  # a token that the expression does not allow
    for answer in (broken, whole):
        llm.engine.add(answer.sequence)
    while llm.engine.busy:
        llm.engine.step()
    assert broken.sequence.finish_reason == "error"
    assert isinstance(broken.sequence.error, RequestError)
    assert re.fullmatch("[a-z]+", whole.whole_text())


def test_without_the_option_a_guide_is_refused(shipped: Path) -> None:
    with LLM(shipped, memory="48MiB", context=64) as llm, pytest.raises(RequestError, match="guides=True"):
        llm.generate(PROMPT, SamplingParams(guide=Guide("regex", "a")))
