"""Tools in requests: functions that a model may call, and whether its chat template has a place for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from moestro.server.errors import ApiError
from moestro.server.fields import Fields
from moestro.server.host import Serving
from moestro.server.parts import CALL, THINK, Marks, has_reasoning, takes_calls

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


def tools_for_template(tools: Sequence[Tool] | None, choice: str | None, serving: Serving) -> list[dict[str, Any]]:
    """The tools as the template takes them; none where the model is not to call any. Raises ApiError."""
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


def marks_of(serving: Serving, prompt: Sequence[int], *, tools: bool) -> Marks:
    """What to look for in an answer to this prompt."""
    reasoning = has_reasoning(template_of(serving))
    tail = str(serving.llm.tokenizer.decode(list(prompt[-_TAIL:]))) if reasoning else ""
    return Marks(reasoning=reasoning, calls=tools, thinking=tail.rstrip().endswith(THINK))


def template_of(serving: Serving) -> str:
    """The model's chat template, empty if there is none. Of several, the first."""
    template = serving.llm.tokenizer.chat_template or ""
    return template if isinstance(template, str) else next(iter(template.values()), "")
