"""What a single token stands for: its bytes, and a text to show."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import cast

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The bytes of a tokenizer's tokens, those of half characters too, which decoding would lose."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {int(number): str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}
        self._by_bytes = _is_byte_level(tokenizer)

    def data(self, token: int) -> bytes:
        """The bytes that a token adds to a text. Ids that the tokenizer does not know have none."""
        if token in self._added:
            return self._added[token].encode()
        piece = cast(str | None, self._tokenizer.convert_ids_to_tokens(token))
        if piece is None:
            return b""
        if self._by_bytes:
            table = _byte_of_character()
            return bytes(table[one] for one in piece if one in table)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each character of a token stands for a byte, as in GPT-2."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
