"""Fields of a request become `SamplingParams`."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import fields, replace
from typing import Any

from moestro.config import Guide, SamplingParams
from moestro.errors import RequestError
from moestro.server.defaults import Defaults
from moestro.server.errors import as_api_error
from moestro.server.fields import SamplingFields

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "quality",
    "skip_special_tokens",
    "return_routed_experts",
    "stop",
    "stop_token_ids",
    "logit_bias",
)
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


def sampling_of(
    request: SamplingFields,
    defaults: Defaults,
    *,
    max_tokens: int,
    logprobs: int | None,
    guide: Guide | None = None,
) -> SamplingParams:
    """What the request asks for. `logprobs` is how many alternatives of each token are told (None: nothing).

    Raises:
        ApiError: 400, with the field.
    """
    values: dict[str, Any] = dict(defaults.values)
    values |= {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    values |= {name: float(value) for name, value in values.items() if isinstance(_DEFAULTS[name], float)}
    seed = secrets.randbits(63) if request.seed is None else request.seed
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, seed=seed, guide=guide, **values)
    except RequestError as error:
        raise as_api_error(error) from error


def choices_of(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """The same for each of `count` answers, but for the seed: the first has the one given, others are made of it."""
    return [replace(sampling, seed=_derived(sampling.seed, number)) for number in range(count)]


def _derived(seed: int, number: int) -> int:
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
