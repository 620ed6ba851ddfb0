"""How one request picks its tokens: every value that a client may give, checked by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.errors import RequestError
from moestro.options import check_least, check_types, option

MOST_LOGPROBS = 20
MOST_STOPS = 16
GUIDE_KINDS = ("json_schema", "json_object", "regex", "grammar")


@dataclass(frozen=True)
class Guide:
    """What an answer has to look like. `source` is the JSON schema as text, the regular expression, or the grammar in
    Lark's or llama.cpp's notation; empty for `json_object`.

    Raises:
        RequestError: there is no such kind, or the source is not a text.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GUIDE_KINDS:
            raise RequestError(f"guide is of kind {self.kind!r}, expected one of: {', '.join(GUIDE_KINDS)}.")
        if not isinstance(self.source, str) or bool(self.source) == (self.kind == "json_object"):
            wanted = "nothing beside its kind" if self.kind == "json_object" else "a text of at least one character"
            raise RequestError(f"guide is a {self.kind} of {self.source!r}, expected {wanted}.")

    @classmethod
    def of(cls, given: Any) -> Guide | None:
        """A guide, nothing, or an object of one key: {"regex": "..."}, {"json_schema": {...}}, {"json_object": true}.

        Raises:
            RequestError: it is none of these.
        """
        if given is None or isinstance(given, Guide):
            return given
        if not isinstance(given, Mapping) or len(given) != 1:
            raise RequestError(f"guide is {given!r}, expected an object with one key of: {', '.join(GUIDE_KINDS)}.")
        ((kind, source),) = given.items()
        if kind == "json_object" and source is True:
            return cls(kind)
        if kind == "json_schema" and isinstance(source, Mapping | bool):
            source = json.dumps(source)
        return cls(kind, source)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens. Environment twins: `MOESTRO_MAX_TOKENS`, `MOESTRO_TEMPERATURE`, ...

    The tokens are a function of the model, the prompt and these values alone, whatever else is in flight. From the
    model's logits on, in this order: `logit_bias` is added, penalties apply, what the `guide` rules out leaves; at
    temperature 0 the likeliest token is taken, else temperature applies, then `min_p`, `top_k` and `top_p`.

    Raises:
        RequestError: a value is not valid; the message begins with the field's name.
    """

    max_tokens: int = option(128, "Most new tokens.")
    temperature: float = option(0.0, "0 picks the likeliest token; higher is more random.")
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this much probability.")
    top_k: int = option(0, "Sample from this many likeliest tokens (0: all).")
    min_p: float = option(0.0, "Sample from tokens with at least this share of the likeliest one's probability.")
    presence_penalty: float = option(0.0, "Taken off the logit of each token that the answer holds (-2 to 2).")
    frequency_penalty: float = option(
        0.0, "Taken off the logit of a token for each time the answer holds it (-2 to 2)."
    )
    repetition_penalty: float = option(
        1.0, "Logits of tokens in prompt or answer: above 0 divided by it, else times it."
    )
    seed: int = option(0, "Seed of this request's random numbers.")
    ignore_eos: bool = option(False, "Go on after the end-of-text token.")
    quality: str = option("", "What may be given up for speed (empty: as the model was opened).", flag=False)
    stop: Sequence[str] = option((), "Texts that end the answer, and are not part of it.", flag=False, plain=False)
    stop_token_ids: Sequence[int] = option((), "Tokens that do so.", flag=False, plain=False)
    logit_bias: Mapping[int, float] | None = option(
        None, "Added to the logits of these tokens (-100 to 100).", flag=False, plain=False
    )
    logprobs: int | None = option(
        None,
        "Log-probabilities of the answer's tokens and of so many likeliest ones at each place, in nats, as the model "
        "found them: before bias, penalties, guide and temperature (nothing: none).",
        flag=False,
        plain=False,
    )
    skip_special_tokens: bool = option(True, "Leave tokens such as <|end|> out of the text.", flag=False)
    return_routed_experts: bool = option(False, "Tell which experts each token was routed to.", flag=False)
    guide: Guide | None = option(
        None, "A JSON schema, regular expression or grammar that the answer follows.", flag=False, plain=False
    )

    def __post_init__(self) -> None:
        check_types(self, RequestError)
        self._put(stop=_texts(self.stop), stop_token_ids=_ids("stop_token_ids", self.stop_token_ids))
        self._put(logit_bias=_biases(self.logit_bias), guide=Guide.of(self.guide))
        check_least(self, RequestError, max_tokens=1)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}, expected a number above 0 and at most 1.")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}, expected 0 (all tokens) or a positive whole number.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1.")
        for name, least, most in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise RequestError(f"{name} is {value}, expected a number from {least:g} to {most:g}.")
        if self.logprobs is not None and not (_is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise RequestError(
                f"logprobs is {self.logprobs!r}, expected nothing or a whole number from 0 to {MOST_LOGPROBS}."
            )

    def _put(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _texts(given: object) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) and one for one in texts):
        raise RequestError(f"stop is {given!r}, expected texts of at least one character.")
    if len(texts) > MOST_STOPS:
        raise RequestError(f"stop has {len(texts)} texts, expected at most {MOST_STOPS}.")
    return tuple(texts)


def _ids(name: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise RequestError(f"{name} is {given!r}, expected token ids.")
    ids = tuple(given)
    if not all(_is_whole(one) and one >= 0 for one in ids):
        raise RequestError(f"{name} is {given!r}, expected token ids: whole numbers of at least 0.")
    return ids


def _biases(given: object) -> dict[int, float] | None:
    """Keys may be texts, as JSON has them."""
    if given is None:
        return None
    expected = "expected token ids with numbers from -100 to 100"
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias is {given!r}, {expected}.")
    biases = {}
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        whole = key.isdecimal() if isinstance(key, str) else _is_whole(key) and key >= 0
        if not number or not whole:
            raise RequestError(f"logit_bias holds {key!r}: {value!r}, {expected}.")
        biases[int(key)] = float(value)
    return biases


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
