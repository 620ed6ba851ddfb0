"""Prefixes are reused, and nothing but time and counts shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import save_checkpoint
from moestro.config import SamplingParams
from moestro.engine.engine import Engine
from moestro.engine.prefixes import Prefixes
from moestro.engine.sampling import Sampler
from moestro.engine.sequence import Sequence
from moestro.runtime.kv import BLOCK_ROWS, KVPool, LayerKV, block_bytes
from moestro.runtime.open import OpenModel
from opening import open_store
from packing import pack_raw

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


def _prefixes(blocks: int, *, keep: bool = True) -> Prefixes:
    layers = (LayerKV(heads=1, key_width=1, value_heads=1, value_width=1, gathered=False),)
    pool = KVPool(layers=layers, blocks=blocks, buffer=torch.zeros(blocks * block_bytes(layers), dtype=torch.uint8))
    return Prefixes(pool, keep=keep)


def _sequence(prompt: list[int], *, new: int = 1, budget: float = 0.0) -> Sequence:
    params = SamplingParams(max_tokens=new)
    return Sequence(prompt_ids=prompt, sampling=params, sampler=Sampler(params), budget=budget)


def _run(prefixes: Prefixes, sequence: Sequence) -> Sequence:
    """As if its whole prompt were computed."""
    assert prefixes.start(sequence)
    sequence.reused = sequence.cached
    sequence.cached = len(sequence.prompt_ids)
    prefixes.written(sequence)
    return sequence


def test_what_begins_alike_shares_its_full_blocks() -> None:
    prefixes = _prefixes(20)
    first = _run(prefixes, _sequence([*range(40)]))
    second = _run(prefixes, _sequence([*range(35), 99, 99]))
    assert (first.reused, second.reused) == (0, 32)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    assert _run(prefixes, _sequence([5, *range(1, 40)])).reused == 0


def test_one_token_is_always_left_to_compute() -> None:
    prefixes = _prefixes(20)
    _run(prefixes, _sequence([7] * 32))
    assert _run(prefixes, _sequence([7] * 32)).reused == 16
    assert _run(prefixes, _sequence([7] * 33)).reused == 32


def test_qualities_are_kept_apart() -> None:
    prefixes = _prefixes(20)
    _run(prefixes, _sequence([7] * 40, budget=0.01))
    assert _run(prefixes, _sequence([7] * 40)).reused == 0
    assert _run(prefixes, _sequence([7] * 40, budget=0.02)).reused == 0
    assert _run(prefixes, _sequence([7] * 40, budget=0.01)).reused == 32


def test_the_least_recently_used_leaves_first_and_of_a_chain_its_end() -> None:
    prefixes = _prefixes(8)
    for token in (1, 2):
        prefixes.end(_run(prefixes, _sequence([token] * 49)))
    assert (prefixes.kept, prefixes.used) == (6, 0)
    prefixes.end(_run(prefixes, _sequence([1] * 49)))  # used again
    large = _sequence([3] * 70)  # 5 blocks, of which 2 are free
    assert prefixes.start(large)
    assert (prefixes.kept, prefixes.used) == (3, 5)
    prefixes.end(large)
    assert _run(prefixes, _sequence([1] * 49)).reused == 48
    assert _run(prefixes, _sequence([2] * 49)).reused == 0


def test_blocks_in_use_stay_and_a_request_without_room_waits() -> None:
    prefixes = _prefixes(4)
    running = _run(prefixes, _sequence([1] * 40))
    assert not prefixes.start(_sequence([1] * 60))  # shares 2 blocks, and needs 2 more where one is free
    assert prefixes.used == 3
    prefixes.end(running)
    assert prefixes.start(_sequence([1] * 60))


def test_two_that_computed_the_same_hold_it_once() -> None:
    prefixes = _prefixes(8)
    one, other = _sequence([1] * 33), _sequence([1] * 33)
    assert prefixes.start(one)
    assert prefixes.start(other)
    for sequence in (one, other):
        sequence.cached = 33
        prefixes.written(sequence)
    assert one.blocks[:2] == other.blocks[:2]
    assert prefixes.used == 4
    prefixes.end(one)
    prefixes.end(other)
    assert (prefixes.kept, prefixes.used) == (2, 0)
    prefixes.forget()
    assert prefixes.kept == 0
    assert _run(prefixes, _sequence([1] * 33)).reused == 0


def test_one_that_begins_as_another_that_is_being_computed_waits_for_it() -> None:
    prefixes = _prefixes(20)
    first, alike, other = _sequence([1] * 40), _sequence([1] * 50), _sequence([2] * 50)
    assert prefixes.start(first)
    assert prefixes.is_coming(alike, [first])
    assert not prefixes.is_coming(other, [first])
    assert not prefixes.is_coming(_sequence([1] * 50, budget=0.5), [first])
    first.cached = 16
    prefixes.written(first)
    assert prefixes.is_coming(alike, [first])
    first.cached = 40
    prefixes.written(first)
    assert not prefixes.is_coming(alike, [first])


def test_nothing_is_kept_when_that_is_off() -> None:
    prefixes = _prefixes(20, keep=False)
    prefixes.end(_run(prefixes, _sequence([1] * 40)))
    assert prefixes.kept == 0
    assert _run(prefixes, _sequence([1] * 40)).reused == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=80)), max_size=25))
def test_blocks_never_get_lost_or_used_twice(steps: list[tuple[int, list[int]]]) -> None:
    prefixes, running = _prefixes(10), list[Sequence]()
    for what, prompt in steps:
        if what == 0 and running:
            prefixes.end(running.pop(len(prompt) % len(running)))
            continue
        sequence = _sequence(prompt, budget=float(what == 3))
        if prefixes.start(sequence):
            sequence.cached = min(len(prompt), sequence.cached + 24)
            prefixes.written(sequence)
            running.append(sequence)
        named = {one.block: one.name for sequence in running for one in sequence.chain}
        own = [block for one in running for block in one.blocks[len(one.chain) :]]
        assert len(set(own)) == len(own)
        assert not set(own) & set(named)
        assert prefixes.used == len(own) + len(named)
        for sequence in running:
            assert sequence.blocks[: len(sequence.chain)] == [one.block for one in sequence.chain]
            assert len(sequence.chain) >= sequence.cached // BLOCK_ROWS
    for sequence in running:
        prefixes.end(sequence)
    assert prefixes.used == 0


@dataclass(frozen=True)
class Ask:
    """A request of an interleaving, and how many steps after the one before it comes."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int
    steps_later: int
    cancel_after: int


BEGINNINGS = [tuple(range(1, 50)), tuple(range(1, 34)), (9,) * 40]


@st.composite
def _asks(draw: st.DrawFn) -> list[Ask]:
    return [
        Ask(
            prompt=(
                *draw(st.sampled_from(BEGINNINGS))[: draw(st.sampled_from([15, 16, 17, 33, 49]))],
                *draw(st.lists(st.integers(0, 159), max_size=3)),
            ),
            sampling=SamplingParams(
                max_tokens=draw(st.integers(1, 20)),
                temperature=draw(st.sampled_from([0.0, 1.0])),
                seed=number,
                logprobs=2,
            ),
            priority=draw(st.integers(0, 2)),
            steps_later=draw(st.integers(0, 4)),
            cancel_after=draw(st.sampled_from([0, 0, 0, 2, 5])),
        )
        for number in range(draw(st.integers(2, 7)))
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    folder = tmp_path_factory.mktemp("prefixes")
    save_checkpoint(request.param, folder / "checkpoint")
    pack_raw(folder / "checkpoint", folder / "store")
    with open_store(folder / "store", share=1.0, max_sequences=3) as model:
        yield model


def _engine(opened: OpenModel, *, prefix_cache: bool) -> Engine:
    options: dict[str, Any] = {"context": 256, "end_ids": frozenset(), "vocabulary": 160}
    return Engine(runner=opened.runner, max_sequences=3, step_rows=24, prefix_cache=prefix_cache, **options)


def _answer(engine: Engine, asks: list[Ask]) -> list[Sequence]:
    sequences: list[Sequence] = []
    left: dict[int, int] = {}
    for ask in asks:
        for _ in range(ask.steps_later):
            _step(engine, sequences, left)
        sequence = engine.prepare(ask.prompt, ask.sampling)
        sequence.priority = ask.priority
        engine.add(sequence)
        if ask.cancel_after:
            left[len(sequences)] = ask.cancel_after
        sequences.append(sequence)
    while engine.busy:
        _step(engine, sequences, left)
    return sequences


def _step(engine: Engine, sequences: list[Sequence], left: dict[int, int]) -> None:
    for place in left:
        left[place] -= 1
        if left[place] == 0:
            engine.cancel(sequences[place])
    if engine.busy:
        engine.step()


@settings(max_examples=12)
@given(asks=_asks())
def test_answers_are_bit_for_bit_those_without_reuse(opened: OpenModel, asks: list[Ask]) -> None:
    """Whatever comes when, is cancelled, gives way to others and takes its place again."""
    kv = opened.runner.kv
    engine = _engine(opened, prefix_cache=True)
    reused = _answer(engine, asks)
    assert engine.kv_use.used == 0
    engine.forget()
    assert kv.free_blocks == kv.blocks
    plain = _engine(opened, prefix_cache=False)
    for ask, found in zip(asks, reused, strict=True):
        alone = plain.submit(ask.prompt, ask.sampling)
        while plain.busy:
            plain.step()
        count = len(found.token_ids)
        assert found.token_ids == alone.token_ids[:count]
        assert found.likelihoods == alone.likelihoods[:count]
        assert found.finish_reason == "cancelled" or count == len(alone.token_ids)


def test_a_conversation_that_goes_on_computes_its_new_part_only(opened: OpenModel) -> None:
    engine = _engine(opened, prefix_cache=True)
    greedy = SamplingParams(max_tokens=20)
    first = engine.submit([*range(1, 50)], greedy)
    while engine.busy:
        engine.step()
    second = engine.submit([*range(1, 50), *first.token_ids, 7, 7], greedy)
    before = opened.runner.expert_counts.sum()
    engine.step()
    assert second.reused == 64
    assert opened.runner.expert_counts.sum() - before == (71 - 64) * _picks(opened)
    engine.cancel(second)
    engine.forget()


def _picks(opened: OpenModel) -> int:
    """Experts that a row takes, of all layers."""
    engine = _engine(opened, prefix_cache=False)
    before = opened.runner.expert_counts.sum()
    engine.submit([1], SamplingParams(max_tokens=1))
    engine.step()
    return int(opened.runner.expert_counts.sum() - before)
