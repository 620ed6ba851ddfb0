"""Token ids to text, piece by piece, never cutting a character in two."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of token ids into text. Its pieces joined are the text of all tokens decoded at once, with
    special ones among them or without."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._token_ids: list[int] = []
        self._start = 0
        self._printed_until = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token: empty while a character's bytes are still incomplete."""
        self._token_ids.append(token)
        before = self._decode(self._token_ids[self._start : self._printed_until])
        after = self._decode(self._token_ids[self._start :])
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        return self._emit(after[len(before) :])

    def finish(self) -> str:
        """What is left at the end, incomplete characters shown as the replacement character."""
        before = self._decode(self._token_ids[self._start : self._printed_until])
        after = self._decode(self._token_ids[self._start :])
        return self._emit(after[len(before) :]) if len(after) > len(before) else ""

    def _emit(self, piece: str) -> str:
        # The last piece stays as left context (tokenizers decide about leading spaces by it) at a constant cost.
        self._start = self._printed_until
        self._printed_until = len(self._token_ids)
        self.text += piece
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
            )
        )
