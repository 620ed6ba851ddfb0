"""Log probabilities in the two forms that OpenAI has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moestro.engine.results import TokenLogprob

_LEAST = -9999.0
"""OpenAI's figure for a token that cannot be: JSON has no infinity."""


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As /v1/chat/completions tells them."""
    return {"content": [_told(one) | {"top_logprobs": [_told(other) for other in one.top]} for one in tokens]}


class CompletionLogprobs:
    """As /v1/completions tells them: columns, with places in the text, which go on from piece to piece."""

    def __init__(self) -> None:
        self._offset = 0

    def take(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The columns of these tokens, the next ones of the answer."""
        offsets = []
        for one in tokens:
            offsets.append(self._offset)
            self._offset += len(one.text)
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [{other.text: _finite(other.logprob) for other in one.top} for one in tokens],
            "text_offset": offsets,
        }


def _told(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.data)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
