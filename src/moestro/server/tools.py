"""Tools in requests: functions that a model may or has to call, and whether its chat template has a place for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from moestro.config import TOOL_PARSERS, Guide
from moestro.engine.tokenizer import template_of
from moestro.server.dialects import HARMONY, HERMES
from moestro.server.errors import ApiError
from moestro.server.fields import Fields
from moestro.server.forced_calls import InexpressibleError, Writer, forced_call
from moestro.server.harmony import HarmonySplitter
from moestro.server.host import Serving
from moestro.server.parts import THINK, THOUGHT, Marks, Splitter, has_reasoning

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


def tools_for_template(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, serving: Serving
) -> list[dict[str, Any]]:
    """The tools as the template takes them; none where the model is not to call any. Raises ApiError."""
    if not tools and _is_forced(choice):
        raise ApiError(400, "tool_choice asks for a call and there are no tools. Give tools.", param="tool_choice")
    if not tools or choice == "none":
        return []
    template = template_of(serving.llm.tokenizer)
    if "tools" not in template or serving.dialect is None:
        raise ApiError(
            400,
            "This model's chat template has no place for tools, or has calls written in none of the ways that this "
            f"server reads ({', '.join(TOOL_PARSERS)}). Leave tools out, or name one of these with --tool-parser.",
            param="tools",
        )
    return [tool.model_dump(exclude_none=True) for tool in tools]


def call_guide(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, marks: Marks, tokenizer: PreTrainedTokenizerBase
) -> Guide | None:
    """What an answer has to follow that is one call, after the reasoning that the prompt may have begun; none where no
    call has to be.

    Raises:
        ApiError: the function to be called is none of `tools`, or no call of them can be asked for in this dialect.
    """
    if not _is_forced(choice):
        return None
    allowed = {tool.function.name: tool.function.parameters or {} for tool in tools or ()}
    if isinstance(choice, NamedTool):
        allowed = {name: schema for name, schema in allowed.items() if name == choice.function.name}
        if not allowed:
            raise ApiError(400, f"There is no function {choice.function.name!r} in tools.", param="tool_choice")
    writer = Writer(tokenizer, template_of(tokenizer))
    try:
        return Guide("grammar", forced_call(marks.dialect, allowed, writer, thinking=THOUGHT if marks.thinking else ""))
    except InexpressibleError as why:
        raise ApiError(
            400,
            f"tool_choice asks for a call, which cannot be promised where calls are written as {marks.dialect.name} "
            f"has them: {why}. Give tool_choice auto, or a plainer schema.",
            param="tools",
        ) from why


def _is_forced(choice: ToolChoice | None) -> bool:
    return choice == "required" or isinstance(choice, NamedTool)


def marks_of(serving: Serving, prompt: Sequence[int], tools: Sequence[Tool]) -> Marks:
    """What to look for in an answer to this prompt, in which these tools may be called."""
    reasoning = has_reasoning(template_of(serving.llm.tokenizer))
    tail = str(serving.llm.tokenizer.decode(list(prompt[-_TAIL:]))) if reasoning else ""
    return Marks(
        reasoning=reasoning,
        calls=bool(tools),
        thinking=tail.rstrip().endswith(THINK),
        dialect=serving.dialect or HERMES,
        schemas={tool.function.name: tool.function.parameters or {} for tool in tools},
    )


def needs_special_tokens(marks: Marks) -> bool:
    """Whether what to look for is not in a text that leaves special tokens out."""
    return marks.dialect is HARMONY or (marks.calls and marks.dialect.special)


def splitter_of(marks: Marks) -> Splitter | HarmonySplitter:
    """What tells the parts of an answer apart."""
    return HarmonySplitter(marks) if marks.dialect is HARMONY else Splitter(marks)
