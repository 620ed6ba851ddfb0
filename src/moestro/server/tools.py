"""Tools in requests: functions that a model may or has to call, and whether its chat template has a place for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from moestro.config import Guide
from moestro.server.errors import ApiError
from moestro.server.fields import Fields
from moestro.server.host import Serving
from moestro.server.parts import CALL, CALLED, THINK, THOUGHT, Marks, has_reasoning, takes_calls

_TAIL = 8
"""So many tokens at the end of a prompt tell whether it has begun the reasoning."""


class Function(Fields):
    """A function by name; `parameters` is a JSON schema. `strict` asks for what cannot be promised here."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Fields):
    """Functions are the only tools there are."""

    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    """One of the request's functions."""

    name: str


class NamedTool(Fields):
    """The function that has to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool

_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How templates write calls, and so how models do."""


def tools_for_template(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, serving: Serving
) -> list[dict[str, Any]]:
    """The tools as the template takes them; none where the model is not to call any. Raises ApiError."""
    if not tools and _is_forced(choice):
        raise ApiError(400, "tool_choice asks for a call and there are no tools. Give tools.", param="tool_choice")
    if not tools or choice == "none":
        return []
    if not takes_calls(template_of(serving)):
        raise ApiError(
            400,
            f"This model's chat template has no place for tools, or calls are not written as JSON in {CALL} marks. "
            "Leave tools out.",
            param="tools",
        )
    return [tool.model_dump(exclude_none=True) for tool in tools]


def call_guide(tools: Sequence[Tool] | None, choice: ToolChoice | None, marks: Marks) -> Guide | None:
    """What an answer has to follow that is one call, after the reasoning that the prompt may have begun; none where no
    call has to be.

    Raises:
        ApiError: the function to be called is none of `tools`.
    """
    if not _is_forced(choice):
        return None
    allowed = [tool.function for tool in tools or ()]
    if isinstance(choice, NamedTool):
        allowed = [function for function in allowed if function.name == choice.function.name]
        if not allowed:
            raise ApiError(400, f"There is no function {choice.function.name!r} in tools.", param="tool_choice")
    schema = {"x-guidance": _AS_TRAINED, "anyOf": [_call_schema(function) for function in allowed]}
    mark, end, thought = (json.dumps(text) for text in (f"{CALL}\n", f"\n{CALLED}", THOUGHT))
    rules = [f"call: {mark} %json {json.dumps(schema)} {end}"]
    if marks.thinking:
        rules += ['start: thought "\\n\\n" call', f"thought[suffix={thought}]: /(.|\\n)*/"]
    else:
        rules += ["start: call"]
    return Guide("grammar", "\n".join(rules) + "\n")


def _is_forced(choice: ToolChoice | None) -> bool:
    return choice == "required" or isinstance(choice, NamedTool)


def _call_schema(function: Function) -> dict[str, Any]:
    """Of a call as it stands between the marks."""
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def marks_of(serving: Serving, prompt: Sequence[int], *, tools: bool) -> Marks:
    """What to look for in an answer to this prompt."""
    reasoning = has_reasoning(template_of(serving))
    tail = str(serving.llm.tokenizer.decode(list(prompt[-_TAIL:]))) if reasoning else ""
    return Marks(reasoning=reasoning, calls=tools, thinking=tail.rstrip().endswith(THINK))


def template_of(serving: Serving) -> str:
    """The model's chat template, empty if there is none. Of several, the first."""
    template = serving.llm.tokenizer.chat_template or ""
    return template if isinstance(template, str) else next(iter(template.values()), "")
