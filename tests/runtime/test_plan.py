"""Plans: the parts add up to the number given, and the least number named is the least."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import FAMILIES
from moestro.config import RuntimeOptions
from moestro.errors import BudgetError
from moestro.hf.skeleton import build_skeleton
from moestro.runtime.kv import LayerKV
from moestro.runtime.model_shape import ModelShape
from moestro.runtime.plan import Plan, compute_threads, make_plan, probe_for, resolve_context
from moestro.runtime.probe import LayerAttention, Probe, probe

PROBE = Probe(
    kv_layers=(LayerKV(heads=2, key_width=16, value_heads=2, value_width=16, gathered=False),) * 3,
    attention=(LayerAttention(scale=0.25, window=0, softcap=0.0, sinks=False),) * 3,
    experts_per_token=(2, 2),
    value_width=16,
    activation_bytes=1_000_000,
    experts_bytes=400_000,
    rows=512,
    history=512,
)


def _plan(memory: int, slots: tuple[int, int] = (8192, 12288), experts: int = 40, *, sequences: int = 1) -> Plan:
    shape = ModelShape(
        name="test",
        dense_bytes=3_000_000,
        chains=tuple((size,) for size in slots),
        experts=(experts, experts),
        level=16,
    )
    options = RuntimeOptions(context=512, memory=str(memory), max_sequences=sequences)
    return make_plan(shape, PROBE, options, config=FAMILIES["mixtral"](), floor_bytes=7)


@given(
    st.integers(min_value=1, max_value=1 << 34),
    st.tuples(*[st.integers(min_value=1, max_value=3000).map(lambda pages: pages * 4096)] * 2),
    st.integers(min_value=1, max_value=128),
)
def test_the_parts_stay_within_the_number(memory: int, slots: tuple[int, int], experts: int) -> None:
    plan = _plan(memory, slots, experts)
    parts = plan.dense_bytes + plan.kv_bytes + plan.activation_bytes + plan.staging_bytes + plan.arena_bytes
    assert plan.fits == (memory >= plan.least_bytes)
    if plan.fits:
        assert parts <= memory
        plan.require_fit()
    else:
        with pytest.raises(BudgetError, match=str(plan.least_bytes)):
            plan.require_fit()
    assert _plan(plan.least_bytes, slots, experts).fits
    assert not _plan(plan.least_bytes - 1, slots, experts).fits
    assert 0 <= plan.arena_experts <= plan.total_experts


@pytest.mark.parametrize("sequences", [2, 16])
def test_one_whole_context_is_enough_to_start(sequences: int) -> None:
    alone, refused = (_plan(1, experts=256, sequences=count) for count in (1, sequences))
    # What the policy notes of each sequence is not KV.
    assert alone.least_bytes <= refused.least_bytes < alone.least_bytes + (sequences << 16)
    least = _plan(refused.least_bytes, experts=256, sequences=sequences)
    least.require_fit()
    assert (least.contexts_at_once, least.max_sequences) == (1, sequences)


@given(more=st.integers(0, 1 << 25), step=st.integers(0, 1 << 22), sequences=st.integers(2, 16))
def test_more_memory_is_more_contexts_first_then_more_experts(more: int, step: int, sequences: int) -> None:
    slots, least = (196_608, 196_608), _plan(1, (196_608, 196_608), 256, sequences=sequences).least_bytes
    small, large = (_plan(least + size, slots, 256, sequences=sequences) for size in (more, more + step))
    assert 32 <= small.kv_blocks <= large.kv_blocks <= 32 * sequences
    for plan in (small, large):
        assert plan.fixed_bytes + plan.arena_bytes <= plan.memory_bytes
        assert plan.arena_bytes >= plan.least_arena_bytes
    if 32 < small.kv_blocks < 32 * sequences:
        # Without that they could not have what of the KV cache no request needs.
        assert small.arena_bytes >= small.least_arena_bytes + small.extent_bytes
    whole = _plan(1 << 40, slots, 256, sequences=sequences)
    assert whole.contexts_at_once == sequences
    assert _plan(whole.bytes_for_experts(0), slots, 256, sequences=sequences).contexts_at_once == sequences


def test_rows_that_are_handed_back_to_attention_are_counted_as_often_as_they_are() -> None:
    skeleton = build_skeleton(FAMILIES["deepseek_v3"]())
    probed = {n: probe_for(skeleton, RuntimeOptions(context=512, max_sequences=n), native=False) for n in (1, 4)}
    assert probed[1].activation_row_bytes == 0 < probed[4].activation_row_bytes
    # All histories at once are what four sequences can come to.
    whole = probe(skeleton, rows=512, history=4 * 512, logit_rows=4)
    counted = probed[4].activation_bytes + probed[4].activation_row_bytes * 3 * 512
    assert whole.activation_bytes <= counted <= 1.01 * whole.activation_bytes


def test_more_memory_than_the_model_is_not_taken() -> None:
    plan = _plan(1 << 40)
    assert plan.arena_experts == plan.total_experts
    assert plan.expected_bytes_per_token == 0
    assert plan.arena_bytes == plan.whole_arena_bytes < plan.expert_bytes + 2 * plan.extent_bytes


def test_a_share_of_the_experts_is_what_the_arena_gets() -> None:
    whole = _plan(1 << 40, (196_608, 196_608), experts=256)
    quarter = _plan(whole.bytes_for_experts(0.25), (196_608, 196_608), experts=256)
    assert quarter.arena_experts == 128
    assert quarter.expected_bytes_per_token == 0.75 * 4 * 196_608


def test_context_is_resolved_against_the_model() -> None:
    config = FAMILIES["mixtral"]()
    assert resolve_context(config, 0) == 512
    assert resolve_context(config, 100) == 100
    with pytest.raises(BudgetError, match="2 to 512"):
        resolve_context(config, 513)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert resolve_context(config, 0) == 64


def test_skeleton_and_shape_speak_of_the_same_experts() -> None:
    assert build_skeleton(FAMILIES["olmoe"]()).total_experts == 24


def test_threads_are_checked_and_their_scratch_is_counted() -> None:
    with pytest.raises(BudgetError, match="threads"):
        compute_threads(RuntimeOptions(threads=-1))
    assert compute_threads(RuntimeOptions(threads=3)) == 3
    shape = ModelShape(name="test", dense_bytes=1, chains=((4096,), (4096,)), experts=(8, 8), level=16)
    few, many = (
        make_plan(
            shape, PROBE, RuntimeOptions(memory="1GiB", threads=threads), config=FAMILIES["mixtral"](), floor_bytes=0
        )
        for threads in (1, 9)
    )
    assert many.staging_bytes > few.staging_bytes
