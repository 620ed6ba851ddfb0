"""Structured output: which tokens may come next so that the answer follows a schema, an expression or a grammar.

llguidance (Microsoft, MIT) compiles them and walks them with the model's own tokens. Shapes: V vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.config import Guide
from moestro.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "grammar": "grammar",
}

_ANY_OBJECT = '{"type": "object"}'
_SPACE: JsonCompileOptions = {"whitespace_pattern": r"( |\n {0,32}|\n\t{0,8})?", "whitespace_flexible": True}
"""Between the parts of JSON. Without a bound, models whose likeliest token is a space write nothing else."""


class Guides:
    """Makes guides into constraints for one model. Any thread may use it.

    It takes about 0.7 KB for each token of the vocabulary, and two seconds for 150,000 of them.

    Raises:
        RequestError: the model's tokenizer is of a kind that guides cannot be followed with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, end_ids: frozenset[int]) -> None:
        try:
            self._tokenizer = from_tokenizer(
                cast(PreTrainedTokenizerFast, tokenizer), n_vocab=vocabulary, eos_token=sorted(end_ids) or None
            )
        except ValueError as error:
            raise RequestError(
                f"The model's tokenizer does not do for structured output ({_line(error)}). Expected a fast tokenizer "
                "of transformers; open the model without guides."
            ) from error
        self._vocabulary = vocabulary

    def constraint(self, guide: Guide) -> GuideConstraint:
        """What an answer that follows `guide` starts with. Takes milliseconds, up to a second for large schemas.

        Raises:
            RequestError: the guide is not valid, not supported, or nothing can follow it.
        """
        grammar = _grammar(guide)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise _refusal(guide, messages[0])
        for message in messages:
            logging.getLogger("moestro").warning("guide: of the %s this is ignored: %s", _NAMES[guide.kind], message)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(guide, matcher.get_error())
        return GuideConstraint(matcher, self._tokenizer, self._vocabulary)


class GuideConstraint:
    """Where one answer stands in its guide."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, vocabulary: int) -> None:
        self._matcher, self._tokenizer, self._vocabulary = matcher, tokenizer, vocabulary

    @property
    def complete(self) -> bool:
        """Whether nothing may come any more."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """Whether each token may come next: bool [V].

        Raises:
            RequestError: the guide has become too complex to go on, or no token can go on with it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little", count=self._vocabulary).astype(bool)
        if self._matcher.is_error() or not allowed_V.any():
            raise RequestError(
                f"guide: the answer cannot go on ({_line(self._matcher.get_error() or 'no token is allowed')}). "
                "Give a simpler one."
            )
        return allowed_V

    def take(self, token: int) -> None:
        """A token was picked, of those allowed."""
        self._matcher.consume_token(token)


def _grammar(guide: Guide) -> str:
    """In llguidance's own notation. Raises RequestError as `Guides.constraint`."""
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.source)
    try:
        if guide.kind == "grammar":
            return LLMatcher.grammar_from_lark(any_to_lark(guide.source))
        return LLMatcher.grammar_from_json_schema(guide.source or _ANY_OBJECT, defaults=_SPACE)
    except Exception as error:  # the converter of llama.cpp's grammars raises Exception's own subclasses
        raise _refusal(guide, error) from error


def _refusal(guide: Guide, why: object) -> RequestError:
    return RequestError(
        f"guide: the {_NAMES[guide.kind]} is not valid or not supported: {_line(why)}. Mend it, or leave that part out."
    )


def _line(message: object) -> str:
    """A message of several lines as one."""
    return " ".join(str(message).split()).rstrip(".")
