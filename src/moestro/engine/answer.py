"""The text of a request, as its tokens come."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from moestro.engine.detokenize import Detokenizer
from moestro.engine.sequence import Sequence


class Answer:
    """Follows one sequence. `text` is what has become certain of it so far."""

    def __init__(self, sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> None:
        self.sequence = sequence
        self.text = ""
        self._detokenizer = Detokenizer(tokenizer)
        self._told_text = 0
        self._told_tokens = 0
        self._ended = False
        sequence.listener = self._take

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether tokens have come since `news` was last called."""
        return self._told_tokens < len(self.sequence.token_ids)

    def whole_text(self) -> str:
        """The text of an answer that has ended."""
        assert self.finished
        self._end()
        return self.text

    def news(self) -> tuple[str, list[int]]:
        """Text and tokens that have come since the last call."""
        if self.finished:
            self._end()
        text, tokens = self.text[self._told_text :], self.sequence.token_ids[self._told_tokens :]
        self._told_text, self._told_tokens = len(self.text), len(self.sequence.token_ids)
        return text, tokens

    def _take(self, token: int) -> bool:
        self.text += self._detokenizer.push(token)
        return False

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self.text += self._detokenizer.finish()
