"""Text in pieces: joined they are the whole, and none shows half a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moestro.engine.detokenize import Detokenizer
from moestro.store.locate import locate_source

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate_source("tiny-qwen3moe-28m"))


def _pieces(token_ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, skip_special=skip_special)
    pieces = [detokenizer.push(token) for token in token_ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return pieces


@given(st.text(max_size=60))
def test_pieces_of_any_text_join_to_the_text(text: str) -> None:
    pieces = _pieces(TOKENIZER(text)["input_ids"])
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(
    st.lists(st.integers(min_value=0, max_value=4095) | st.sampled_from(TOKENIZER.all_special_ids), max_size=40),
    st.booleans(),
)
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(token_ids: list[int], skip_special: bool) -> None:
    assert "".join(_pieces(token_ids, skip_special)) == TOKENIZER.decode(token_ids, skip_special_tokens=skip_special)


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces = _pieces(TOKENIZER("\N{OLD PERSIAN SIGN AURAMAZDAA}!")["input_ids"])
    assert [piece for piece in pieces if piece] == ["\N{OLD PERSIAN SIGN AURAMAZDAA}", "!"]
