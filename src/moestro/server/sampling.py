"""Fields of a request become `SamplingParams`."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import fields, replace
from typing import Any

from moestro.config import SamplingParams
from moestro.errors import RequestError
from moestro.server.defaults import Defaults
from moestro.server.errors import ApiError
from moestro.server.fields import SamplingFields

PARAMS = tuple(field.name for field in fields(SamplingParams))

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
)


def sampling_of(
    request: SamplingFields, defaults: Defaults, *, max_tokens: int, logprobs: int | None, **more: Any
) -> SamplingParams:
    """What the request asks for. `logprobs` is how many alternatives of each token are told (None: nothing).

    Raises:
        ApiError: 400, with the field.
    """
    values: dict[str, Any] = dict(defaults.values)
    values |= {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    values |= {name: float(value) for name, value in values.items() if isinstance(_DEFAULTS.get(name), float)}
    values["seed"] = secrets.randbits(63) if request.seed is None else request.seed
    if request.stop is not None:
        values["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias is not None:
        values["logit_bias"] = _bias(request.logit_bias)
    values |= more
    if logprobs is not None:
        values["logprobs"] = logprobs
    unsupported = [name for name in values if name not in PARAMS]
    if unsupported:
        raise ApiError(400, f"{unsupported[0]} is not supported. Leave it out.", param=unsupported[0])
    try:
        return SamplingParams(max_tokens=max_tokens, **values)
    except RequestError as error:
        name = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), param=name if name in PARAMS else None, code="invalid_value") from error


def choices_of(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """The same for each of `count` answers, but for the seed: the first has the one given, the others are made of it."""
    return [replace(sampling, seed=_derived(sampling.seed, number)) for number in range(count)]


def _derived(seed: int, number: int) -> int:
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in given.items()}
    except ValueError as error:
        raise ApiError(
            400, 'logit_bias has a key that is no token id. Expected ids as strings: {"50": -100}.', param="logit_bias"
        ) from error


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
