"""From texts to windows of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration.checkpoints import save_with_tokenizer
from moestro.calibration.text import (
    LEAST_WINDOW,
    MOST_WINDOWS,
    TOKENS,
    WINDOW,
    TextFile,
    load_tokenizer,
    make_windows,
    read_text,
)
from moestro.errors import PackError
from moestro.store.calibration_facts import CalibrationText
from moestro.store.checksum import checksum
from moestro.store.locate import locate_source


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are single characters."""
    folder = tmp_path_factory.mktemp("letters")
    save_with_tokenizer("mixtral", folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def _text(*documents: str) -> TextFile:
    return TextFile(CalibrationText("text", 0), documents)


def test_the_sample_gives_full_windows_of_every_domain() -> None:
    text = read_text("")
    assert text.facts.name == "the shipped sample"
    assert len(text.documents) == 65
    sizes = [len(document.encode()) for document in text.documents]
    per_domain = [sum(sizes[domain::13]) for domain in range(13)]
    assert max(per_domain) < 1.15 * min(per_domain)
    assert 150_000 < sum(sizes) < 200_000
    windows = make_windows(
        text, AutoTokenizer.from_pretrained(locate_source("tiny-qwen3moe-28m")), context=1024, vocabulary=4096
    )
    assert windows.tokens == TOKENS
    assert {len(sequence) for sequence in windows.sequences[: len(text.documents)]} <= set(range(400, WINDOW + 1))
    assert len(windows.short) == 128


def test_first_windows_come_first(letters: PreTrainedTokenizerBase) -> None:
    text = _text("a" * 50, "b" * 20, "c" * 33)
    windows = make_windows(text, letters, context=20, vocabulary=160)
    shown = [letters.decode(sequence).replace(" ", "") for sequence in windows.sequences]
    assert shown == ["a" * 20, "b" * 20, "c" * 20, "a" * 20, "c" * 13, "a" * 10]
    assert letters.decode(windows.short).replace(" ", "") == "a" * 5 + "b" * 5 + "a" * 5 + "c" * 5


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(8, 50), st.integers(1, 200))
def test_windows_are_pieces_of_documents(lengths: list[int], context: int, tokens: int) -> None:
    tokenizer = _CharacterTokens()
    documents = [chr(97 + index) * length for index, length in enumerate(lengths)]
    if max(lengths) < LEAST_WINDOW:
        with pytest.raises(PackError, match="has no document of at least 8 tokens"):
            make_windows(_text(*documents), tokenizer, context=context, vocabulary=160, tokens=tokens)  # type: ignore[arg-type]
        return
    windows = make_windows(_text(*documents), tokenizer, context=context, vocabulary=160, tokens=tokens)  # type: ignore[arg-type]
    assert all(0 < len(sequence) <= context for sequence in windows.sequences)
    assert windows.tokens <= tokens + LEAST_WINDOW + context
    assert 0 < len(windows.short) <= context
    for sequence in windows.sequences:
        assert len(set(sequence)) == 1
        assert sequence[0] - 97 < len(lengths)


class _CharacterTokens:
    """As much of a tokenizer as is used; character codes are tokens."""

    def __call__(self, text: str, verbose: bool) -> _CharacterTokens:
        del verbose
        self.input_ids = [ord(letter) for letter in text]
        return self


def test_a_plain_text_is_one_document(letters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("x" * 100)
    text = read_text(str(path))
    assert text.facts == CalibrationText("plain.txt", checksum(b"x" * 100))
    windows = make_windows(text, letters, context=30, vocabulary=160)
    assert [len(sequence) for sequence in windows.sequences] == [30, 30, 30, 10]


def test_tiny_contexts_get_fewer_tokens(letters: PreTrainedTokenizerBase) -> None:
    windows = make_windows(_text("x" * 10_000), letters, context=10, vocabulary=160)
    assert len(windows.sequences) == MOST_WINDOWS
    assert windows.tokens == 10 * MOST_WINDOWS


def test_a_tokenizer_of_another_model_is_found(letters: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PackError, match="gives token 90, the model has 90"):
        make_windows(_text("x" * 20), letters, context=20, vocabulary=90)


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert load_tokenizer(tmp_path) is None
