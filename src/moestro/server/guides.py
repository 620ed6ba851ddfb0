"""`response_format`: what an answer has to look like."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from moestro.config import Guide
from moestro.server.fields import Fields


class TextFormat(Fields):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Fields):
    """A schema by name. Answers always keep to it, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Fields):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Fields):
    """Text that a regular expression matches: an addition to OpenAI's formats."""

    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1)]


class GrammarFormat(Fields):
    """Text of a grammar in the notation of Lark or llama.cpp: an addition to OpenAI's formats."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


def guide_of(form: ResponseFormat | None) -> Guide | None:
    """What the answer has to follow; nothing for plain text."""
    match form:
        case JsonObjectFormat():
            return Guide("json_object")
        case JsonSchemaFormat():
            return Guide("json_schema", json.dumps(form.json_schema.schema_))
        case RegexFormat():
            return Guide("regex", form.pattern)
        case GrammarFormat():
            return Guide("grammar", form.grammar)
        case _:
            return None
