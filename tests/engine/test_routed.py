"""Requests that ask are told the experts of their tokens: those that were computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.engine.routed import RoutedExperts, RoutingLog
from packing import pack_raw

ASKING = SamplingParams(max_tokens=12, ignore_eos=True, return_routed_experts=True)


def _routed(llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[RoutedExperts | None]:
    return [one.routed_experts for one in llm.generate(prompts, sampling)]


def _counts(found: RoutedExperts, experts: int) -> np.ndarray:
    """[L, E] tokens routed to each expert."""
    return np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in found.experts_TLK.swapaxes(0, 1)])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])  # native, general
def test_what_is_told_is_what_was_computed(family: str, tmp_path: Path) -> None:
    pack_raw(tiny_checkpoint(tmp_path / "model", family=family), tmp_path / "store")
    prompts = [[(5 * place + 3 * number) % 60 + 1 for place in range(20 + number)] for number in range(3)]
    with LLM(tmp_path / "store", memory="64MiB", context=64, max_sequences=3, prefix_cache=False) as llm:
        before = llm.expert_counts().copy()
        alone = [_routed(llm, [prompt], [ASKING])[0] for prompt in prompts]
        counts_LE = llm.expert_counts() - before
        silent = replace(ASKING, return_routed_experts=False)
        together = _routed(llm, [*prompts, prompts[0]], [ASKING, ASKING, ASKING, silent])
    assert together[3] is None
    for prompt, one, other in zip(prompts, alone, together, strict=False):
        assert one is not None
        assert other is not None
        assert one.first == other.first == 0
        assert len(one.experts_TLK) == len(prompt) + 12 - 1
        assert np.array_equal(one.experts_TLK, other.experts_TLK)
    told = sum(_counts(one, counts_LE.shape[1]) for one in alone if one is not None)
    assert np.array_equal(told, counts_LE)


def test_what_another_request_had_computed_is_not_told(shipped: Path) -> None:
    prompt = list(range(5, 45))
    with LLM(shipped, memory="48MiB", context=128) as llm:
        whole, rest = (_routed(llm, [prompt], [ASKING])[0] for _ in range(2))
    assert whole is not None
    assert rest is not None
    assert (whole.first, rest.first) == (0, 32)
    assert np.array_equal(whole.experts_TLK[32:], rest.experts_TLK)


def test_tokens_that_come_again_count_once() -> None:
    ids_TLK = np.arange(24).reshape(12, 1, 2)
    log = RoutingLog()
    assert log.taken() is None
    log(2, ids_TLK[2:8])
    log(8, ids_TLK[8:9])
    log(6, ids_TLK[6:10])  # it gave up its place, and what was kept of it ends at 6
    log(10, ids_TLK[10:])
    found = log.taken()
    assert found is not None
    assert found.first == 2
    assert np.array_equal(found.experts_TLK, ids_TLK[2:])
    log(0, ids_TLK)
    found = log.taken()
    assert found is not None
    assert found.as_json() == {"first": 0, "experts": ids_TLK.tolist()}
