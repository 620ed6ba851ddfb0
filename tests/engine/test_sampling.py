"""Sampling: what temperature, top-k, top-p and the seed promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.config import Guide, SamplingParams
from moestro.engine.sampling import Sampler, _candidates
from moestro.errors import RequestError

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def _draws(count: int, logits: torch.Tensor = LOGITS, **params: float) -> list[int]:
    sampler = Sampler(SamplingParams(**params))  # type: ignore[arg-type]
    return [sampler.pick(logits) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert _draws(3) == [1, 1, 1]
    assert _draws(1, torch.tensor([0.0, 5.0, 5.0])) == [1]


def test_frequencies_follow_the_probabilities() -> None:
    draws = np.bincount(_draws(20_000, temperature=1.5), minlength=5) / 20_000
    expected = torch.softmax(LOGITS / 1.5, -1).numpy()
    assert np.abs(draws - expected).max() < 0.015


def test_the_smallest_temperature_is_greedy() -> None:
    assert set(_draws(20, temperature=1e-320)) == {1}


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(_draws(500, temperature=2.0, top_k=2)) == {1, 2}
    probabilities = torch.softmax(LOGITS, -1)
    just_two = float(probabilities[1] + probabilities[2]) - 1e-4
    assert set(_draws(500, temperature=1.0, top_p=just_two)) == {1, 2}
    assert set(_draws(500, temperature=1.0, top_p=just_two + 2e-4)) == {0, 1, 2}
    assert set(_draws(50, temperature=1.0, top_p=1e-9)) == {1}


def test_the_seed_decides() -> None:
    assert _draws(50, temperature=1.0, seed=3) == _draws(50, temperature=1.0, seed=3)
    assert _draws(50, temperature=1.0, seed=3) != _draws(50, temperature=1.0, seed=4)


def test_min_p_cuts_what_is_much_less_likely_than_the_likeliest() -> None:
    assert set(_draws(500, temperature=1.0, min_p=0.99 * np.exp(-1.0))) == {1, 2}
    assert set(_draws(500, temperature=1.0, min_p=1.01 * np.exp(-1.0))) == {1}
    # Temperature comes first, and what min-p leaves is all that top-p sees.
    assert set(_draws(500, temperature=2.0, min_p=0.99 * np.exp(-1.0))) == {0, 1, 2}
    assert set(_draws(500, temperature=1.0, min_p=0.2, top_p=0.73)) == {1}


def test_bias_penalties_and_the_answers_own_tokens() -> None:
    assert _draws(1, logit_bias={4: 4.5}) == [4]
    assert _draws(3, logit_bias={1: -100}) == [2, 2, 2]
    # 3 and 2 and 1 with 0.6 off for each time: a token comes back when the others have lost as much.
    assert _draws(6, frequency_penalty=0.6) == [1, 1, 2, 1, 2, 1]
    assert _draws(4, presence_penalty=1.1) == [1, 2, 1, 1]
    assert _draws(4, presence_penalty=-1.0) == [1, 1, 1, 1]
    assert _draws(3, repetition_penalty=2.0) == [1, 2, 1]


def test_the_repetition_penalty_counts_the_prompt_and_moves_negative_logits_down() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [1, 2])
    assert sampler.pick(torch.tensor([1.4, 3.0, 2.0])) == 1
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0]).pick(torch.tensor([-1.0, -1.5])) == 1


@given(st.lists(st.floats(min_value=-50, max_value=50, width=32), min_size=1, max_size=60), st.integers(0, 20))
def test_likelihoods_are_the_log_softmax_of_the_models_own_logits(logits: list[float], top: int) -> None:
    row = torch.tensor(logits)
    sampler = Sampler(SamplingParams(logprobs=top, temperature=1.5, top_k=1, logit_bias={0: -50}))
    token = sampler.pick(row)
    found = sampler.likelihood(row, token)
    assert found is not None
    expected = torch.log_softmax(row.double(), -1)
    assert found.logprob == pytest.approx(float(expected[token]))
    assert [one for one, _ in found.top] == torch.sort(expected, descending=True, stable=True).indices[:top].tolist()
    assert [value for _, value in found.top] == pytest.approx([float(expected[one]) for one, _ in found.top])


def test_nobody_who_has_not_asked_gets_likelihoods() -> None:
    assert Sampler(SamplingParams()).likelihood(LOGITS, 1) is None


def test_values_come_as_json_has_them() -> None:
    params = SamplingParams(
        stop="end",
        stop_token_ids=[5],
        logit_bias={"7": 1},  # type: ignore[dict-item]
        guide={"json_schema": {"type": "object"}},  # type: ignore[arg-type]
    )
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (5,), {7: 1.0})
    assert params.guide == Guide("json_schema", '{"type": "object"}')


@given(
    st.lists(st.floats(min_value=-50, max_value=50, width=32), min_size=1, max_size=40),
    st.floats(min_value=0.01, max_value=10),
    st.integers(min_value=0, max_value=50),
    st.floats(min_value=0.001, max_value=1.0),
)
def test_every_draw_is_among_the_allowed(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    row = torch.tensor(logits)
    token = _draws(1, row, temperature=temperature, top_k=top_k, top_p=top_p)[0]
    rank = int((row > row[token]).sum())
    assert rank < (top_k or len(logits))


@given(
    st.integers(1, 3000),
    st.floats(min_value=0.0, max_value=8.0),
    st.sampled_from([0, 1, 50, 300, 3000]),
    st.floats(min_value=0.001, max_value=1.0),
    st.integers(0, 2**16),
)
def test_candidates_are_those_of_the_whole_order(
    vocabulary: int, spread: float, top_k: int, top_p: float, seed: int
) -> None:
    """Flat and steep distributions, with ties."""
    logits = np.round(np.random.default_rng(seed).normal(size=vocabulary) * spread, 1)
    weights = np.exp(logits)
    order = np.argsort(-logits, kind="stable")[: top_k or vocabulary]
    expected = weights[order].cumsum()
    actual, cumulative = _candidates(logits, weights, top_k=top_k, top_p=top_p)
    assert (actual == order[: len(actual)]).all()
    assert (cumulative == expected[: len(cumulative)]).all()
    assert top_p == 1.0 or cumulative[-1] >= top_p * expected[-1] * (1 - 1e-12)
    assert top_p == 1.0 or len(actual) == 1 or cumulative[-2] <= top_p * expected[-1] * (1 + 1e-12)


def test_a_large_vocabulary_is_drawn_from_as_a_small_one() -> None:
    """Blocks without any weight at all among those that have some, and a last one that is not full."""
    logits = torch.full((5000,), float("-inf"))
    tokens = torch.tensor([0, 255, 256, 3001, 4999])
    logits[tokens] = LOGITS
    draws = np.bincount(_draws(20_000, logits, temperature=1.5), minlength=5000) / 20_000
    assert draws[tokens.numpy()].sum() == pytest.approx(1.0)
    assert np.abs(draws[tokens.numpy()] - torch.softmax(LOGITS / 1.5, -1).numpy()).max() < 0.015


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logits_that_are_no_numbers_give_a_token(params: dict[str, float]) -> None:
    assert 0 <= _draws(1, torch.full((700,), float("nan")), temperature=1.0, **params)[0] < 700


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"top_k": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"min_p": 1.5},
        {"presence_penalty": 3},
        {"frequency_penalty": -2.5},
        {"repetition_penalty": 0.0},
        {"stop": ""},
        {"stop": ["a", 5]},
        {"stop": ["a"] * 17},
        {"stop_token_ids": "12"},
        {"stop_token_ids": [-1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {5: 101}},
        {"logit_bias": [5]},
        {"logprobs": 21},
        {"logprobs": True},
        {"guide": {"poem": "a"}},
        {"guide": {"regex": ""}},
        {"guide": "json"},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
