"""Texts in windows: which tokens, which of them are scored, how they are spread."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.perturbed import MODEL, TEXT
from moestro.engine.windows import Text, cut_windows
from moestro.errors import RequestError
from moestro.store.locate import locate_source

LONG = Text("long", TEXT * 4)
SHORT = Text("short", TEXT)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate_source(MODEL))
    return loaded


@pytest.fixture(scope="module")
def with_begin(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, putting token 0 before every text."""
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert begins("a")["input_ids"][0] == 0
    return begins


@given(window=st.integers(2, 300))
def test_windows_are_the_text_without_gaps(tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    token_ids = tokenizer(LONG.content)["input_ids"]
    windows = cut_windows(tokenizer, [LONG], window=window)
    assert len(windows) == len(token_ids) // window
    assert [token for one in windows for token in one.token_ids] == token_ids[: len(windows) * window]
    assert {one.first_scored for one in windows} == {1}


@given(windows=st.integers(2, 40))
def test_a_bound_spreads_windows_evenly_over_the_texts(tokenizer: PreTrainedTokenizerBase, windows: int) -> None:
    window = 16
    whole = cut_windows(tokenizer, [LONG, SHORT], window=window)
    available = [sum(one.text == text for one in whole) for text in (0, 1)]
    chosen = cut_windows(tokenizer, [LONG, SHORT], window=window, max_tokens=windows * window + 3)
    counts = [sum(one.text == text for one in chosen) for text in (0, 1)]
    assert sum(counts) == windows
    assert counts[0] - counts[1] in (0, 1) or counts[1] == available[1]
    places = [whole.index(one) for one in chosen if one.text == 0]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert places == sorted(set(places))
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_bound_above_all_there_is_takes_all(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [LONG, SHORT]
    assert cut_windows(tokenizer, texts, window=16, max_tokens=10**9) == cut_windows(tokenizer, texts, window=16)


def test_special_tokens_stand_before_every_window(
    tokenizer: PreTrainedTokenizerBase, with_begin: PreTrainedTokenizerBase
) -> None:
    plain = cut_windows(tokenizer, [LONG], window=31)
    begun = cut_windows(with_begin, [LONG], window=32)
    assert [one.token_ids for one in begun] == [(0, *one.token_ids) for one in plain]
    assert {one.first_scored for one in begun} == {1}
    with pytest.raises(RequestError, match="special"):
        cut_windows(with_begin, [LONG], window=2)


def test_bad_texts_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="nothing is empty"):
        cut_windows(tokenizer, [LONG, Text("nothing", "")], window=16)
    with pytest.raises(RequestError, match=r"short has \d+ tokens, fewer than"):
        cut_windows(tokenizer, [LONG, SHORT], window=400)
    with pytest.raises(RequestError, match="max_tokens is 31, expected at least 32"):
        cut_windows(tokenizer, [LONG, SHORT], window=16, max_tokens=31)
