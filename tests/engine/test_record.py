"""Traces of a model at work: on prompts and on texts, with and without lookahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.tiny import tiny_checkpoint
from moestro import LLM
from moestro.config import RuntimeOptions, SamplingParams
from moestro.engine.record import RecordProgress, record_answers, record_texts
from moestro.engine.tokenizer import load_tokenizer
from moestro.engine.windows import Text
from moestro.errors import RequestError
from moestro.store.reader import Store
from moestro.trace.eam import eam_of_rows
from packing import pack_raw

WORDS = "A trace says which experts each word of a text was sent to.\n" * 8
MEMORY = RuntimeOptions(memory="64MiB")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    tiny_checkpoint(folder / "checkpoint")
    return pack_raw(folder / "checkpoint", folder / "store").path


def test_answers_are_those_of_the_model(store: Path) -> None:
    prompts = [Text("one", "Some words"), Text("two", "Other words, and more of them")]
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    seen: list[RecordProgress] = []
    trace = record_answers(
        store,
        prompts,
        options=RuntimeOptions(memory="64MiB", max_sequences=2),
        sampling=sampling,
        progress=seen.append,
    )
    with LLM(store, memory="64MiB") as llm:
        completions = llm.generate([one.content for one in prompts], sampling)
        counts_LE = llm.expert_counts()
    tokenizer = load_tokenizer(Store.open(store))
    np.testing.assert_array_equal(eam_of_rows(trace.experts_NLK, trace.num_experts), counts_LE)
    for request, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = tokenizer(prompt.content)["input_ids"]
        assert trace.token_N[trace.rows_of(request)].tolist() == [*ids, *completion.token_ids[:-1]]
        assert trace.meta[request] == {"dataset": prompt.name, "prompt_tokens": len(ids)}
    assert seen[-1] == RecordProgress(2, 2)
    assert trace.step_N is not None
    assert len(set(trace.step_N.tolist())) == 5  # together


def test_a_text_is_routed_as_if_it_were_decoded(store: Path) -> None:
    """Windows that are followed show the experts that the model uses when it answers with the same tokens."""
    followed = record_texts(store, [Text("words", WORDS)], options=MEMORY, window=16, max_tokens=32, prompt_tokens=4)
    ids = followed.token_N[:16].tolist()
    assert load_tokenizer(Store.open(store)).decode(ids) in WORDS
    assert followed.decode_N.tolist() == ([False] * 4 + [True] * 12) * 2
    assert [one.last - one.first for one in followed.passes(0)] == [4, *[1] * 12]
    assert followed.meta[1] == {"dataset": "words", "prompt_tokens": 4}
    whole = record_texts(store, [Text("words", WORDS)], options=MEMORY, window=16, max_tokens=32)
    assert not whole.decode_N.any()
    np.testing.assert_array_equal(followed.experts_NLK, whole.experts_NLK)
    with LLM(store, memory="64MiB") as llm:
        llm.generate([ids[:size] for size in range(1, 17)], SamplingParams(max_tokens=1))
        counts_LE = llm.expert_counts()
    again = [(16 - row) * eam_of_rows(whole.experts_NLK[row : row + 1], whole.num_experts) for row in range(16)]
    np.testing.assert_array_equal(sum(again), counts_LE)


def test_lookahead_changes_no_routing(store: Path) -> None:
    plain = record_texts(store, [Text("words", WORDS)], options=MEMORY, window=16, max_tokens=32)
    ahead = record_texts(store, [Text("words", WORDS)], options=MEMORY, window=16, max_tokens=32, lookahead=2)
    assert ahead.lookahead_NPLC is not None
    assert ahead.lookahead_NPLC.shape == (32, 2, plain.layers, min(2 * plain.picks, plain.num_experts))
    assert (ahead.experts_NLK == plain.experts_NLK).mean() > 0.99  # two paths: sums differ in their last bits
    answers = record_answers(store, [Text("one", "Some words")], options=MEMORY, lookahead=1)
    assert answers.lookahead_NPLC is not None
    assert answers.lookahead_NPLC.shape[:2] == (answers.rows, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window is 1 tokens"),
        ({"window": 16, "prompt_tokens": 16}, "prompt of each window is 16 tokens. Expected 0"),
        ({"window": 16, "prompt_tokens": -1}, "prompt of each window is -1"),
        ({"window": 16, "lookahead": 3}, "lookahead is 3 layers. Expected 0 to 2"),
        ({"window": 16, "lookahead": -1}, "lookahead is -1"),
        ({"window": 16, "max_tokens": 3}, "max_tokens is 3"),
    ],
)
def test_what_cannot_be_is_refused(store: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        record_texts(store, [Text("words", WORDS)], options=MEMORY, **arguments)
