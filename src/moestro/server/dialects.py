"""How families of models write calls of tools: the marks around calls, and what stands between them. One of each.

A call that is not written as its dialect has it is an error here, and text to whoever asked.
Sources: the chat templates and tokenizers of Qwen2.5, Qwen3, Qwen3-Coder, Mixtral and later Mistral models, Llama 3.1,
gpt-oss and DeepSeek-V3 and -V3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.config import TOOL_PARSERS

CALL, CALLED = "<tool_call>", "</tool_call>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
PYTHON = "<|python_tag|>"
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
BLOCK, BLOCK_END, BEGIN, SEPARATOR, END = (
    f"<\uff5c{words}\uff5c>"
    for words in ("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁sep", "tool▁call▁end")
)

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of functions' parameters, by the functions' names."""


class NoCallError(Exception):
    """What stands between marks is not a call."""


@dataclass(frozen=True)
class Call:
    """A function by name, and its arguments: a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Dialect:
    """A way to write calls.

    Calls stand between one of `opens` and `closes` (empty: they go to the end of the answer); with `at_start` only
    where an answer begins. `read` takes all of it, marks included. `signs` are what a chat template that asks for this
    has: all texts of one of them, and none of `others`. With `special` the marks are special tokens, which text leaves
    out by itself.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    read: Callable[[str, Schemas], list[Call]]
    opens: tuple[str, ...] = ()
    closes: str = ""
    others: tuple[str, ...] = ()
    at_start: bool = False
    special: bool = False

    def fits(self, template: str) -> bool:
        """Whether a chat template asks for calls like these."""
        asked = any(all(text in template for text in sign) for sign in self.signs)
        return asked and not any(text in template for text in self.others)


def find_dialect(asked: str, template: str) -> Dialect | None:
    """The dialect by name; with `auto` the one that a chat template asks for, None if it is none of these."""
    if asked != "auto":
        return DIALECTS[asked]
    return next((dialect for dialect in DIALECTS.values() if dialect.fits(template)), None)


def _read_hermes(text: str, _: Schemas) -> list[Call]:
    return [_call(_json(_between(text, CALL, CALLED)))]


def _read_llama3(text: str, _: Schemas) -> list[Call]:
    """One object, or several apart by semicolons."""
    rest, calls = text.strip().removeprefix(PYTHON).strip(), []
    while rest:
        value, end = _first_json(rest)
        calls.append(_call(value, "parameters"))
        rest = rest[end:].lstrip(" \n;")
    return _some(calls)


def _read_mistral(text: str, _: Schemas) -> list[Call]:
    """Lists of objects, as from the first versions on, or names before `ARGS`, as from version 11 on."""
    calls = []
    for piece in text.split(TOOL_CALLS)[1:]:
        if piece.lstrip()[:1] in ("[", "{"):
            found = _json(piece)
            calls += [_call(one) for one in (found if isinstance(found, list) else [found])]
            continue
        name, mark, arguments = piece.partition(ARGS)
        if not mark:
            name, brace, rest = piece.partition("{")
            arguments = brace + rest
        calls.append(_named(name.partition("[CALL_ID]")[0], arguments))
    return _some(calls)


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _read_qwen3_coder(text: str, schemas: Schemas) -> list[Call]:
    found = _FUNCTION.fullmatch(_between(text, CALL, CALLED).strip())
    if found is None:
        raise NoCallError
    name, rest = found[1].strip(), found[2].strip()
    properties = schemas.get(name, {}).get("properties")
    arguments, place = {}, 0
    while place < len(rest):
        parameter = _PARAMETER.match(rest, place)
        if parameter is None:
            raise NoCallError
        key = parameter[1].strip()
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        arguments[key] = _typed(parameter[2], schema)
        place = parameter.end()
    return [_named(name, json.dumps(arguments, ensure_ascii=False))]


_DEEPSEEK = re.compile(rf"\s*{re.escape(BEGIN)}(.*?){re.escape(SEPARATOR)}(.*?){re.escape(END)}\s*", re.DOTALL)
_FENCED = re.compile(r"([^\n]+)\n```json\n(.*)\n```", re.DOTALL)


def _read_deepseek(text: str, _: Schemas) -> list[Call]:
    """V3 has the kind before the separator and the name after it, arguments in a fence; V3.1 name and arguments."""
    rest, calls, place = _between(text, BLOCK, BLOCK_END), [], 0
    while place < len(rest):
        found = _DEEPSEEK.match(rest, place)
        if found is None:
            raise NoCallError
        fenced = _FENCED.fullmatch(found[2].strip())
        calls.append(_named(fenced[1], fenced[2]) if fenced else _named(found[1], found[2]))
        place = found.end()
    return _some(calls)


def read_harmony(text: str, _: Schemas) -> list[Call]:
    """A message, from the mark of its channel on, that is for a function. `server.harmony` tells messages apart."""
    header, mark, body = text.partition(MESSAGE)
    found = re.search(r"to=functions\.([^\s<]+)", header)
    if not mark or found is None:
        raise NoCallError
    return [_named(found[1], body)]


def _between(text: str, opens: str, closes: str) -> str:
    return text.removeprefix(opens).removesuffix(closes)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCallError from error


def _first_json(text: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise NoCallError from error


def _call(value: Any, key: str = "arguments") -> Call:
    """Of an object with a name and arguments, as an object or as text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise NoCallError
    arguments = value.get(key, value.get("arguments", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _named(name: str, arguments: str) -> Call:
    """Of a name and a JSON object as text."""
    if not name.strip() or not isinstance(_json(arguments), dict):
        raise NoCallError
    return Call(name.strip(), arguments.strip())


def _some(calls: list[Call]) -> list[Call]:
    if not calls:
        raise NoCallError
    return calls


def _typed(text: str, schema: Any) -> Any:
    """A parameter's value as its schema has it; text where there is none, or where it is not of that type."""
    if not isinstance(schema, Mapping) or schema.get("type") == "string":
        return text
    try:
        return _json(text)
    except NoCallError:
        return text


_ALL = (
    Dialect("harmony", ((CHANNEL, MESSAGE),), read_harmony, special=True),
    Dialect("deepseek_v3", ((BLOCK,),), _read_deepseek, (BLOCK,), BLOCK_END, special=True),
    Dialect("mistral", ((TOOL_CALLS,),), _read_mistral, (TOOL_CALLS,), special=True),
    Dialect("qwen3_coder", (("<function=", CALL),), _read_qwen3_coder, (CALL,), CALLED),
    Dialect("hermes", ((CALL,),), _read_hermes, (CALL,), CALLED, others=("<arg_key>",)),
    Dialect(
        "llama3_json",
        ((PYTHON,), ('"parameters": dictionary',)),
        _read_llama3,
        (PYTHON, "{"),
        at_start=True,
        special=True,
    ),
)
DIALECTS = {dialect.name: dialect for dialect in _ALL}
HERMES, HARMONY = DIALECTS["hermes"], DIALECTS["harmony"]
assert set(DIALECTS) == set(TOOL_PARSERS), "options and dialects have different names"
