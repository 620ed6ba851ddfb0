"""The Python API on the built-in model: what is generated, alone and packed, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moestro import LLM, MoestroError, SamplingParams
from moestro.errors import BudgetError, RequestError

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl", "1 + 2 ="]
GREEDY = SamplingParams(max_tokens=24)
RANDOM = [SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def llm(shipped: Path) -> Iterator[LLM]:
    with LLM(shipped, memory="48MiB", context=256, max_sequences=3) as opened:
        yield opened


def test_packed_requests_get_the_tokens_they_get_alone(llm: LLM) -> None:
    for sampling in ([GREEDY] * 4, RANDOM):
        packed = llm.generate(PROMPTS, sampling)
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, sampling, strict=True)]
        assert [one.token_ids for one in packed] == [one.token_ids for one in alone]
        assert [one.text for one in packed] == [one.text for one in alone]


def test_stream_is_the_whole_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY)[0]
    deltas = list(llm.stream(PROMPTS[0], GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert deltas[-1].completion is not None
    assert deltas[-1].completion.token_ids == whole.token_ids
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert deltas[-1].finish_reason == whole.finish_reason == "length"


def test_streams_and_batches_can_run_at_the_same_time(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    seen: list[list[int]] = [list(next(stream).token_ids) for stream in streams]
    assert llm.generate(PROMPTS[2], GREEDY)[0].token_ids == alone[2]
    for tokens, stream in zip(seen, streams, strict=True):
        tokens.extend(token for delta in stream for token in delta.token_ids)
    assert seen == alone[:2]


def test_text_is_what_the_tokenizer_makes_of_the_tokens(llm: LLM) -> None:
    # Japanese takes several tokens a character: pieces must never show half of one.
    deltas = list(llm.stream("このマニュアル", SamplingParams(max_tokens=60)))
    last = deltas[-1].completion
    assert last is not None
    assert last.text == llm.tokenizer.decode(last.token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in delta.text for delta in deltas[:-1])


def test_end_of_text_stops_and_can_be_ignored(llm: LLM) -> None:
    eos = llm.tokenizer.eos_token_id
    # The model seldom ends by itself so soon: its end token is made likelier.
    common = {"temperature": 1.2, "logit_bias": {eos: 7.0}}
    params = [SamplingParams(max_tokens=40, seed=seed, **common) for seed in range(8)]
    answers = zip(params, llm.generate([PROMPTS[1]] * len(params), params), strict=True)
    one, done = max(
        ((one, done) for one, done in answers if done.finish_reason == "stop"), key=lambda pair: len(pair[1].token_ids)
    )
    assert len(done.token_ids) > 1
    assert eos not in done.token_ids
    longer = llm.generate(PROMPTS[1], SamplingParams(max_tokens=40, seed=one.seed, ignore_eos=True, **common))[0]
    assert longer.token_ids[: len(done.token_ids) + 1] == [*done.token_ids, eos]
    assert (len(longer.token_ids), longer.finish_reason) == (40, "length")


def test_closing_a_stream_frees_its_place(llm: LLM) -> None:
    for _ in range(5):
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(llm.generate(PROMPTS, GREEDY)) == 4


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_counts_and_stats_add_up(shipped: Path, prefetch: str) -> None:
    with LLM(shipped, memory="32MiB", context=128, prefetch=prefetch) as llm:
        done = llm.generate(PROMPTS[0], SamplingParams(max_tokens=10))[0]
        counts, stats = llm.expert_counts(), llm.stats()
        fed = done.prompt_tokens + 9
        assert counts.shape == (8, 32)
        assert (counts.sum(axis=1) == 4 * fed).all()
        assert stats.hits + stats.misses >= 8 * 4
        assert stats.bytes_read % 196608 == 0
        asked = stats.bytes_read - stats.prefetched_bytes
        assert asked <= stats.misses * 196608
        if prefetch == "off":
            assert stats.bytes_read == asked == stats.misses * 196608
        assert stats.arena_bytes + stats.dense_bytes + stats.kv_bytes + stats.activation_bytes <= stats.memory_bytes
        assert done.timings.ttft_s > 0
        assert done.timings.decode_tokens_per_s > 0
        assert stats.stall_s >= 0
        assert 0 < stats.expert_s < stats.compute_s


def test_an_answer_ends_at_the_end_of_the_context(llm: LLM) -> None:
    done = llm.generate(PROMPTS[0], SamplingParams(max_tokens=5000, ignore_eos=True))[0]
    assert len(done.token_ids) + done.prompt_tokens == 256
    assert done.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ("", GREEDY, "empty"),
        ("a\udcff", GREEDY, "not valid Unicode"),
        ("word " * 400, GREEDY, "context holds 256"),
        ([5, 4096], GREEDY, "outside the model's vocabulary"),
    ],
)
def test_bad_requests(llm: LLM, prompt: str | list[int], sampling: SamplingParams, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate([PROMPTS[0], prompt], sampling)
    assert len(llm.generate(PROMPTS[0], GREEDY)) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "48MiB", "context": 1}, "takes 2 to 1024"),
        ({"memory": "48MiB", "context": 64.0}, "context is 64.0"),
        ({"memory": "48MiB", "threads": -2}, "threads"),
        ({"memory": "banana"}, "banana"),
        ({"memory": "1MiB"}, "is the least that works"),
        ({"memory": "48MiB", "context": 100_000}, "takes 2 to 1024"),
        ({"memory": "48MiB", "max_sequences": 0}, "max_sequences"),
        ({"memory": "48MiB", "policy": "astrology"}, "astrology"),
        ({"memory": "48MiB", "admit": "by beauty"}, "by beauty"),
    ],
)
def test_bad_options(shipped: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(MoestroError, match=says):
        LLM(shipped, **options)


def test_the_least_memory_named_by_the_error_works(shipped: Path) -> None:
    with pytest.raises(BudgetError) as refusal:
        LLM(shipped, memory="1MiB", context=64)
    least = int(str(refusal.value).split("(")[1].split(" ")[0])
    with LLM(shipped, memory=str(least), context=64) as llm:
        assert np.count_nonzero(llm.generate(PROMPTS[0], SamplingParams(max_tokens=5))[0].token_ids) == 5
    with pytest.raises(BudgetError):
        LLM(shipped, memory=str(least - 4096), context=64)


def test_chat_prompt_goes_through_the_template(llm: LLM) -> None:
    token_ids = llm.chat_prompt([{"role": "user", "content": "Hello"}])
    assert llm.tokenizer.decode(token_ids) == "Hello\n"
    assert len(llm.generate(token_ids, SamplingParams(max_tokens=3))) == 1


def test_generating_does_not_wait_for_a_suspended_stream(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=60, ignore_eos=True))
    first = next(stream)
    llm.generate(PROMPTS[1], SamplingParams(max_tokens=2))
    rest = list(stream)
    assert rest[-1].completion is not None
    assert [*first.token_ids, *(token for delta in rest for token in delta.token_ids)] == rest[-1].completion.token_ids


def test_a_closed_model_keeps_its_stats_and_nothing_else(shipped: Path) -> None:
    llm = LLM(shipped, memory=40 << 20, context=64)
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))
    before, counts = llm.stats(), llm.expert_counts()
    llm.close()
    llm.close()
    assert llm.stats().hits == before.hits
    assert np.array_equal(llm.expert_counts(), counts)
    with pytest.raises(RequestError, match="closed"):
        llm.generate(PROMPTS[0], GREEDY)
