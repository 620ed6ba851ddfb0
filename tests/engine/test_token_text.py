"""Bytes of single tokens: joined they are the text, whatever kind of tokenizer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.engine.token_text import TokenTexts
from moestro.store.locate import locate_source

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate_source("tiny-qwen3moe-28m"))
TEXTS = TokenTexts(TOKENIZER)


@given(st.text(max_size=60))
def test_bytes_of_tokens_join_to_the_text(text: str) -> None:
    assert b"".join(TEXTS.data(token) for token in TOKENIZER(text)["input_ids"]) == text.encode()


def test_special_and_unknown_tokens() -> None:
    end = TOKENIZER.eos_token_id
    assert TEXTS.data(end) == str(TOKENIZER.convert_ids_to_tokens(end)).encode()
    assert TEXTS.data(10**6) == b""


def test_tokens_of_sentencepiece() -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "\u2581the": 1, "<0xE3>": 2, "end": 3}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [texts.data(token) for token in (1, 2, 3)] == [b" the", b"\xe3", b"end"]
