"""What a request may ask for, on the built-in model: its tokens never depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro import LLM, SamplingParams
from moestro.errors import RequestError

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl", "1 + 2 ="]
KINDS: list[dict[str, object]] = [
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 1.2, "top_k": 30, "frequency_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "logit_bias": {32: 5.0, 100: -100.0}},
    {"stop": ["e ", "\n\n"], "temperature": 0.5},
    {"logprobs": 3, "temperature": 1.0},
]


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, memory="64MiB", context=96, max_sequences=16) as opened:
        yield opened


def test_a_request_among_fifteen_others_gets_what_it_gets_alone(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=16 + number, seed=number, **KINDS[number % len(KINDS)])  # type: ignore[arg-type]
        for number in range(16)
    ]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(16)]
    together = llm.generate(prompts, params)
    for prompt, one, packed in zip(prompts, params, together, strict=True):
        alone = llm.generate(prompt, one)[0]
        assert (packed.token_ids, packed.text, packed.finish_reason) == (
            alone.token_ids,
            alone.text,
            alone.finish_reason,
        )
        assert packed.logprobs == alone.logprobs


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[1], SamplingParams(max_tokens=30))[0]
    stop = whole.text[20:24]
    sampling = SamplingParams(max_tokens=30, stop=[stop, "never to be found"])
    cut = llm.generate(PROMPTS[1], sampling)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    pieces = [delta.text for delta in llm.stream(PROMPTS[1], sampling)]
    assert "".join(pieces) == cut.text
    unstopped = llm.generate(PROMPTS[1], SamplingParams(max_tokens=30, stop=whole.text[-1] + "never to be found"))[0]
    assert (unstopped.text, unstopped.finish_reason) == (whole.text, "length")


def test_a_stop_token_ends_the_answer_even_where_the_end_of_text_does_not(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[1], SamplingParams(max_tokens=30))[0]
    token = whole.token_ids[5]
    cut = llm.generate(PROMPTS[1], SamplingParams(max_tokens=30, stop_token_ids=[token], ignore_eos=True))[0]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token)]


def test_log_probabilities_come_with_their_tokens(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=12, logprobs=2)
    whole = llm.generate(PROMPTS[2], sampling)[0]
    assert [one.id for one in whole.logprobs] == whole.token_ids
    assert b"".join(one.data for one in whole.logprobs).decode() == whole.text
    for one in whole.logprobs:
        assert len(one.top) == 2
        assert (one.top[0].id, one.top[0].logprob) == (one.id, one.logprob)  # greedy takes the likeliest
        assert 0 >= one.top[0].logprob >= one.top[1].logprob
    deltas = list(llm.stream(PROMPTS[2], sampling))
    assert tuple(one for delta in deltas for one in delta.logprobs) == whole.logprobs


def test_a_bias_forbids_and_forces(llm: LLM) -> None:
    first = llm.generate(PROMPTS[1], SamplingParams(max_tokens=1))[0].token_ids[0]
    assert llm.generate(PROMPTS[1], SamplingParams(max_tokens=1, logit_bias={first: -100}))[0].token_ids[0] != first
    assert llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, logit_bias={77: 100}))[0].token_ids == [77] * 3


@pytest.mark.parametrize("bad", [{"stop_token_ids": [4096]}, {"logit_bias": {5000: 1.0}}])
def test_tokens_that_the_model_does_not_have_are_refused(llm: LLM, bad: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        llm.generate(PROMPTS[0], SamplingParams(**bad))  # type: ignore[arg-type]
