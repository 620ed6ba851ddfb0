"""The grammar of an answer that is one call, as each dialect has it written (see `dialects`).

Grammars are in llguidance's notation of Lark. Marks that are special tokens of the model are named by their ids: a text
between quotes never matches one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moestro.config import TOOL_PARSERS
from moestro.server.dialects import (
    ARGS,
    BEGIN,
    BLOCK,
    BLOCK_END,
    CALL,
    CALLED,
    CHANNEL,
    END,
    MESSAGE,
    SEPARATOR,
    TOOL_CALLS,
    Dialect,
    Schemas,
)

_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How templates write calls, and so how models do."""

_QUOTED = ("hermes", "llama3_json")
"""Dialects with quotes around functions' names, which may be any text there."""

_NAME = re.compile(r"[\w.-]+")
_ANY = "/(.|\\n)*/"
_ANY_OBJECT = {"type": "object"}
_LINE, _PARAMETER_END = "\n", "</parameter>"
_PLAIN_OBJECT = {"type", "title", "description", "properties", "required", "additionalProperties", "$defs"}
"""What the schema of a function's parameters may say where each is written by itself."""

_PLAIN_STRING = {"type", "title", "description", "default", "examples", "enum", "const"}
"""What the schema of a string may say where strings stand without quotes."""


class InexpressibleError(Exception):
    """A call of this function cannot be asked for in this dialect; the message says why."""


@dataclass(frozen=True)
class Writer:
    """Writes parts of grammars for one model: `template` is its chat template."""

    tokenizer: PreTrainedTokenizerBase
    template: str

    def text(self, text: str) -> str:
        """A text, or the special token that it is."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        special = isinstance(token, int) and token in self.tokenizer.all_special_ids
        return f"<[{token}]>" if special and token != self.tokenizer.unk_token_id else _quoted(text)

    def texts(self, *texts: str) -> str:
        """One after the other."""
        return " ".join(map(self.text, texts))

    def until(self, name: str, mark: str) -> str:
        """A rule of this name: anything up to a mark, and the mark."""
        written = self.text(mark)
        return f"{name}[suffix={written}]: {_ANY}" if written.startswith('"') else f"{name}: {_ANY} {written}"


def forced_call(dialect: Dialect, functions: Schemas, writer: Writer, *, thinking: str = "") -> str:
    """The grammar of a call of one of these functions.

    `thinking` is the mark at which the reasoning ends that the prompt has begun; empty where it has begun none.

    Raises:
        InexpressibleError: the dialect has no way to write what a schema asks for.
    """
    for name in functions:
        if dialect.name not in _QUOTED and not _NAME.fullmatch(name):
            raise InexpressibleError(f"{name!r} has characters in it that end a function's name")
    rules = ['start: thought "\\n\\n" call', writer.until("thought", thinking)] if thinking else ["start: call"]
    return "\n".join([*rules, *_RULES[dialect.name](functions, writer)]) + "\n"


def _hermes(functions: Schemas, writer: Writer) -> list[str]:
    return [f"call: {writer.texts(CALL, _LINE)} {_object(functions)} {writer.texts(_LINE, CALLED)}"]


def _llama3(functions: Schemas, _: Writer) -> list[str]:
    return [f"call: {_object(functions, 'parameters')}"]


def _mistral(functions: Schemas, writer: Writer) -> list[str]:
    """Names before `ARGS` where the template has these, else a list of one object."""
    if ARGS in writer.template:
        return [f"call: {writer.text(TOOL_CALLS)} ({_each(functions, lambda name: writer.texts(name, ARGS))})"]
    return [f'call: {writer.text(TOOL_CALLS)} " "? "[" {_object(functions)} "]"']


def _deepseek(functions: Schemas, writer: Writer) -> list[str]:
    """With the kind before the name and a fence around the arguments where the template has these."""
    fenced = "```json" in writer.template
    kind = writer.texts("function", SEPARATOR) if fenced else ""
    after = "\n```json\n" if fenced else SEPARATOR
    closes = writer.texts("\n```", END, BLOCK_END) if fenced else writer.texts(END, BLOCK_END)
    calls = _each(functions, lambda name: writer.texts(name, after))
    return [f"call: {writer.texts(BLOCK, BEGIN)} {kind} ({calls}) {closes}"]


def _harmony(functions: Schemas, writer: Writer) -> list[str]:
    """Reasoning if the model wants it, then a message for a function."""
    begins = writer.texts(CHANNEL, "analysis", MESSAGE)
    json_ = writer.texts("<|constrain|>", "json", MESSAGE)
    calls = _each(functions, lambda name: f"{_quoted(f'commentary to=functions.{name} ')} {json_}")
    return [
        f"call: ({begins} analysis {writer.texts('<|start|>', 'assistant')})? {writer.text(CHANNEL)} ({calls})",
        writer.until("analysis", "<|end|>"),
    ]


def _qwen3_coder(functions: Schemas, writer: Writer) -> list[str]:
    """Parameters in the order of the schema; strings stand without quotes, up to the mark after them."""
    bodies = " | ".join(_qwen_function(name, schema) for name, schema in functions.items())
    return [
        f"call: {writer.texts(CALL, _LINE)} ({bodies}) {writer.texts('</function>', _LINE, CALLED)}",
        writer.until("text", _PARAMETER_END),
    ]


def _qwen_function(name: str, schema: Mapping[str, Any]) -> str:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if (
        not isinstance(properties, Mapping)
        or not isinstance(required, list)
        or schema.get("type", "object") != "object"
    ):
        raise InexpressibleError(f"the parameters of {name!r} are not those of an object")
    strange = [*(schema.keys() - _PLAIN_OBJECT), *(key for key in required if key not in list(properties))]
    if strange:
        raise InexpressibleError(f"the parameters of {name!r} are not listed one by one ({strange[0]!r})")
    shared = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    parts = [_quoted(f"<function={name}>\n")]
    for key, one in properties.items():
        if not _NAME.fullmatch(key):
            raise InexpressibleError(f"a parameter of {name!r} has a name that ends its mark ({key!r})")
        part = f"{_quoted(f'<parameter={key}>{_LINE}')} {_qwen_value(f'{name}.{key}', one, shared)} {_quoted(_LINE)}"
        parts.append(part if key in required else f"({part})?")
    return " ".join(parts)


def _qwen_value(place: str, schema: Any, shared: Mapping[str, Any]) -> str:
    """A value and the mark after it."""
    end = _LINE + _PARAMETER_END
    if not isinstance(schema, Mapping):
        return f"{_json(schema)} {_quoted(end)}"
    if schema.get("type") != "string":
        return f"{_json({**schema, **shared})} {_quoted(end)}"
    if strange := schema.keys() - _PLAIN_STRING:
        raise InexpressibleError(f"{place!r} is text that has to have a form ({', '.join(sorted(strange))})")
    if not schema.keys() & {"enum", "const"}:
        return "text"
    chosen = schema.get("enum", [schema.get("const")])
    if not isinstance(chosen, list) or not chosen or not all(isinstance(one, str) for one in chosen):
        raise InexpressibleError(f"{place!r} is text that is to be one of {chosen!r}")
    return f"({' | '.join(_quoted(one + end) for one in chosen)})"


def _object(functions: Schemas, key: str = "arguments") -> str:
    """An object of a name and arguments. (In one schema for all of it, references in parameters would lead nowhere.)"""
    calls = _each(functions, lambda name: _quoted(f'{{"name": {_quoted(name)}, "{key}": '))
    return f'({calls}) "}}"'


def _each(functions: Schemas, before: Callable[[str], str]) -> str:
    """What stands before each function's arguments, and these."""
    return " | ".join(f"{before(name)} {_json(schema or _ANY_OBJECT)}" for name, schema in functions.items())


def _json(schema: Any) -> str:
    spaced = {"x-guidance": _AS_TRAINED, **schema} if isinstance(schema, Mapping) else schema
    return f"%json {json.dumps(spaced)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_RULES: dict[str, Callable[[Schemas, Writer], list[str]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3,
    "mistral": _mistral,
    "deepseek_v3": _deepseek,
    "harmony": _harmony,
    "qwen3_coder": _qwen3_coder,
}
assert set(_RULES) == set(TOOL_PARSERS), "dialects that no call can be asked for in"
