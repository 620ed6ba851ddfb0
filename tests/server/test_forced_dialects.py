"""In every dialect a forced call has a grammar: what models write fits it, and all that fits it is such a call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cli.running import MODEL
from moestro.config import Guide
from moestro.engine.guides import Guides
from moestro.server.dialects import ARGS, BEGIN, BLOCK, BLOCK_END, DIALECTS, END, PYTHON, SEPARATOR, TOOL_CALLS
from moestro.server.forced_calls import InexpressibleError, Writer, forced_call
from moestro.server.parts import THOUGHT, Kind, Marks
from moestro.server.tools import splitter_of
from moestro.store.locate import locate_source

SPECIAL = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", PYTHON, TOOL_CALLS, ARGS]
SPECIAL += [BLOCK, BLOCK_END, BEGIN, SEPARATOR, END]
FUNCTIONS: dict[str, dict[str, Any]] = {
    "f": {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False},
    "g": {
        "type": "object",
        "properties": {
            "s": {"type": "string", "enum": ["a b", "<c>"]},
            "d": {"$ref": "#/$defs/day"},
            "l": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["s", "d"],
        "additionalProperties": False,
        "$defs": {"day": {"enum": ["Monday", 7]}},
    },
}
HARMONY = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
WRITTEN = [
    ("hermes", "", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
    ("qwen3_coder", "", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"),
    ("mistral", "", f'{TOOL_CALLS} [{{"name": "f", "arguments": {{"x": 1}}}}]'),
    ("mistral", ARGS, f'{TOOL_CALLS}f{ARGS}{{"x": 1}}'),
    ("llama3_json", "", '{"name": "f", "parameters": {"x": 1}}'),
    ("harmony", "", HARMONY),
    ("harmony", "", f"<|channel|>analysis<|message|>Hm, or\nso.<|end|><|start|>assistant{HARMONY}"),
    ("deepseek_v3", "", f'{BLOCK}{BEGIN}f{SEPARATOR}{{"x": 1}}{END}{BLOCK_END}'),
    ("deepseek_v3", "```json", f'{BLOCK}{BEGIN}function{SEPARATOR}f\n```json\n{{"x": 1}}\n```{END}{BLOCK_END}'),
]
"""Dialects, what of a template tells its forms apart, and a call."""


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The built-in model's, as it is and with dialects' marks as special tokens."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate_source(MODEL))
    if request.param:
        loaded.add_special_tokens({"additional_special_tokens": SPECIAL})
    return loaded


@pytest.fixture(scope="module")
def guides(tokenizer: PreTrainedTokenizerBase) -> Guides:
    return Guides(tokenizer, vocabulary=len(tokenizer), end_ids=frozenset({tokenizer.eos_token_id}))


def _guide(
    name: str, tokenizer: PreTrainedTokenizerBase, template: str, functions: Mapping[str, Any] = FUNCTIONS, **how: Any
) -> Guide:
    return Guide("grammar", forced_call(DIALECTS[name], functions, Writer(tokenizer, template), **how))


def _fits(guides: Guides, guide: Guide, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    constraint = guides.constraint(guide)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if constraint.complete or not constraint.allowed()[token]:
            return False
        constraint.take(token)
    return constraint.complete


def _call(name: str, text: str) -> tuple[str, dict[str, Any]]:
    """The call that this text is, with nothing beside it but reasoning."""
    splitter = splitter_of(Marks(calls=True, dialect=DIALECTS[name], schemas=FUNCTIONS))
    parts = [*splitter.push(text), *splitter.finish()]
    assert not "".join(part.text for part in parts if part.kind is Kind.TEXT).strip(), text
    (call,) = (part.call["function"] for part in parts if part.call is not None)
    return call["name"], json.loads(call["arguments"])


def test_every_dialect_is_tested() -> None:
    assert {name for name, _, _ in WRITTEN} == DIALECTS.keys()


@pytest.mark.parametrize(("name", "template", "text"), WRITTEN)
def test_a_call_as_models_write_it_fits(
    name: str, template: str, text: str, guides: Guides, tokenizer: PreTrainedTokenizerBase
) -> None:
    guide = _guide(name, tokenizer, template)
    assert _call(name, text) == ("f", {"x": 1})
    assert _fits(guides, guide, tokenizer, text)
    assert not _fits(guides, guide, tokenizer, text.replace("1", "2"))
    assert not _fits(guides, guide, tokenizer, "So: " + text)
    after = _guide(name, tokenizer, template, thinking=THOUGHT)
    assert _fits(guides, after, tokenizer, f"Let me see.{THOUGHT}\n\n{text}")


@pytest.mark.parametrize(("name", "template", "text"), WRITTEN)
def test_whatever_fits_is_a_call(
    name: str, template: str, text: str, guides: Guides, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Answers that pick among the allowed tokens by chance; not whether to reason, which would have no end."""
    guide = _guide(name, tokenizer, template)
    begins = tokenizer("<|channel|>commentary", add_special_tokens=False)["input_ids"] if name == "harmony" else []
    random, functions = np.random.default_rng(0), set()
    for _ in range(12):
        constraint, tokens = guides.constraint(guide), list[int]()
        while not constraint.complete:
            allowed_A = np.flatnonzero(constraint.allowed())
            picked = begins[len(tokens)] if len(tokens) < len(begins) else random.choice(allowed_A)
            assert picked in allowed_A
            tokens.append(int(picked))
            constraint.take(tokens[-1])
        function, arguments = _call(name, tokenizer.decode(tokens))
        functions.add(function)
        assert arguments.keys() <= FUNCTIONS[function]["properties"].keys()
        assert set(FUNCTIONS[function]["required"]) <= arguments.keys()
        if function == "g":
            assert arguments["s"] in ("a b", "<c>")
            assert arguments["d"] in ("Monday", 7)
            assert len(arguments.get("l", [])) <= 2
    assert functions == {"f", "g"}


def test_functions_without_parameters(guides: Guides, tokenizer: PreTrainedTokenizerBase) -> None:
    for name, template, text in WRITTEN:
        bare = text.replace('{"x": 1}', "{}").replace("<parameter=x>\n1\n</parameter>\n", "")
        assert _fits(guides, _guide(name, tokenizer, template, {"f": {}}), tokenizer, bare), name


def test_texts_without_quotes(guides: Guides, tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}, "required": ["s"]}
    guide = _guide("qwen3_coder", tokenizer, "", {"f": schema})
    for value, rest in (('two\nlines, "so"', ""), ("</x>", "<parameter=n>\n12\n</parameter>\n")):
        inside = f"<parameter=s>\n{value}\n</parameter>\n{rest}"
        assert _fits(guides, guide, tokenizer, f"<tool_call>\n<function=f>\n{inside}</function>\n</tool_call>")
    assert not _fits(guides, guide, tokenizer, "<tool_call>\n<function=f>\n</function>\n</tool_call>")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"s": {"type": "string", "pattern": "a+"}}}, "'f.s'.*pattern"),
        ({"anyOf": [{"properties": {}}]}, "'f'.*anyOf"),
        ({"properties": {}, "required": ["s"]}, "'f'.*s"),
        ({"properties": {"a>b": {}}}, "a>b"),
        ({"properties": []}, "not those of an object"),
        ({"type": "array"}, "not those of an object"),
        ({"properties": {"s": {"type": "string", "enum": 3}}}, "one of 3"),
    ],
)
def test_what_a_dialect_has_no_way_to_write_is_said(
    schema: dict[str, Any], words: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InexpressibleError, match=words):
        _guide("qwen3_coder", tokenizer, "", {"f": schema})


def test_names_that_a_dialect_cannot_tell_from_what_follows(guides: Guides, tokenizer: PreTrainedTokenizerBase) -> None:
    for name, template, _ in WRITTEN:
        if name in ("hermes", "llama3_json"):
            guides.constraint(_guide(name, tokenizer, template, {'a "b> {': {}}))
        else:
            with pytest.raises(InexpressibleError, match="b>"):
                _guide(name, tokenizer, template, {'a "b> {': {}})
