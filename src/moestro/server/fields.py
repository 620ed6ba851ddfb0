"""What request bodies have in common: no unknown fields, no guessing of types, null for what is not given."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 64


class Fields(BaseModel):
    """Fields that are not declared are an error: what would be ignored must not look as if it had worked."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Fields):
    """How a stream is written."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Unit = Annotated[float, Field(ge=0, le=1)]


class SamplingFields(Fields):
    """How tokens are picked: OpenAI's fields, then those of moestro's own.

    Fields whose values change nothing (`user`, `metadata`, ...) are taken with exactly these values.
    """

    model: str | None = Field(default=None, description="The name that /v1/models lists; may be left out.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(default=None, description="Answers to one prompt.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="Left out: one by chance.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = Field(default=None, description="Without effect.")

    top_k: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Sample from so many tokens (0: all).")
    min_p: Unit | None = Field(
        default=None, description="Least probability of a token, as a share of the likeliest one's."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-text token.")
    quality: str | None = Field(
        default=None, description="exact, high, balanced, fast, or nats a token may lose (0.01)."
    )
    skip_special_tokens: bool | None = Field(default=None, description="Leave tokens such as <|end|> out of the text.")
    return_routed_experts: bool | None = Field(
        default=None, description="Tell the experts of each token: `routed_experts` of a choice, when it has ended."
    )
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = Field(default=None, description="Lower ones go first.")
    deadline_s: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Seconds after which the answer ends with what there is."
    )
