"""The native path computes what the general path computes, and its bits depend on nothing but the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from moestro import _native
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.dense import stored
from opening import Feed, logits_of, open_store
from runtime.native.variants import VARIANTS, MakeStore

TOKENS = [(7 * index * index + 3 * index + 11) % 157 + 3 for index in range(64)]
STEPS: list[dict[int, Sequence[int]]] = [
    {0: TOKENS[:1]},
    {0: TOKENS[1:20], 1: TOKENS[40:43]},
    *({0: TOKENS[20 + step : 21 + step], 1: TOKENS[43 + step : 44 + step]} for step in range(6)),
    {2: TOKENS[::-1], 0: TOKENS[26:27]},
    {2: TOKENS[:17], 1: TOKENS[:1], 0: TOKENS[27:28]},
]
"""Prefill, decode, and both in one step."""


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_step_is_that_of_the_general_path(variant: str, make_store: MakeStore) -> None:
    store = make_store(VARIANTS[variant], torch.float32)
    with open_store(store, max_sequences=3) as native, open_store(store, max_sequences=3, native=False) as general:
        assert (native.runner.path, general.runner.path) == ("native", "general")
        one, other = Feed(native), Feed(general)
        for step in STEPS:
            actual, expected = one.step(step), other.step(step)
            for request in step:
                assert (actual[request] - expected[request]).abs().max() <= 1e-4
                assert torch.equal(actual[request].argmax(-1), expected[request].argmax(-1))
                assert expected[request].std() > 0.1, "the logits say nothing"
        assert (native.runner.expert_counts == general.runner.expert_counts).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_types_are_computed_in_fp32(dtype: torch.dtype, make_store: MakeStore) -> None:
    store = make_store(VARIANTS["qwen2_moe"], dtype)
    with open_store(store) as native, open_store(store, native=False) as general:
        assert (logits_of(native, TOKENS) - logits_of(general, TOKENS)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("variant", "dense_bits"), [("gpt_oss", 8), ("olmoe", 4), ("qwen2_moe_odd_widths", 8), ("qwen3_moe", 4)]
)
def test_quantised_weights_take_the_same_kernels(variant: str, dense_bits: int, make_store: MakeStore) -> None:
    """Logits are those of the general path, but where a last bit makes a rounded activation another one, and with it,
    where a router is all but undecided, the choice of an expert for a row."""
    store = make_store(VARIANTS[variant], torch.float32, dense_bits=dense_bits)
    with open_store(store, max_sequences=2) as native, open_store(store, native=False) as general:
        assert (native.runner.path, general.runner.path) == ("native", "general")
        actual = logits_of(native, TOKENS)
        assert torch.equal(logits_of(native, TOKENS, chunk=1), actual)
        difference_T = (actual - logits_of(general, TOKENS)).abs().amax(-1)
    assert difference_T.min() <= 1e-5
    assert (difference_T > 0.2 * actual.std()).sum() <= 0.05 * len(TOKENS)


@pytest.mark.parametrize("variant", ["gpt_oss", "olmoe", "qwen3_moe_dense_layers"])
def test_experts_in_memory_are_computed_on_the_way_with_the_same_bits(variant: str, make_store: MakeStore) -> None:
    """Steps of one row, of few and of many, after a prompt that has brought every expert in; then all are dropped."""
    store = make_store(VARIANTS[variant], torch.float32, dense_bits=8)
    few: list[dict[int, Sequence[int]]] = [{0: TOKENS[:1]}, {1: TOKENS[:2], 2: TOKENS[5:6]}, {1: TOKENS[3:18]}]
    with open_store(store, max_sequences=5) as whole, open_store(store, share=0.0, max_sequences=5) as streamed:
        one, other, planes, native = Feed(whole), Feed(streamed), whole.runner.planes, whole.runner.native
        assert native is not None
        for repeat in range(2):
            for number, step in enumerate([{3 + repeat: TOKENS}, *few]):
                asked, counted = planes.stats, whole.runner.expert_counts.copy()
                seconds = native.experts_seconds
                actual, expected = one.step(step), other.step(step)
                assert all(torch.equal(actual[request], expected[request]) for request in step)
                assert (native.experts_seconds > seconds) == (number > 0), number
                ids_LTK, weights_LTK = native.routing
                assert ids_LTK.shape[1] == len(weights_LTK[0]) == sum(len(tokens) for tokens in step.values())
                used_LE = np.stack([np.bincount(ids.ravel(), minlength=counted.shape[1]) for ids in ids_LTK])
                assert (counted + used_LE == whole.runner.expert_counts).all()
                chains = planes.stats.hits + planes.stats.misses - asked.hits - asked.misses
                assert chains == np.count_nonzero(used_LE)
            planes.clear()
            whole.arena_buffer.tensor.zero_()  # what lay there is gone


@pytest.fixture
def any_isa() -> Iterator[None]:
    """The test may change the instruction set and the number of threads."""
    isa, threads = _native.get_isa(), _native.get_threads()
    yield
    _native.set_isa(isa)
    _native.set_threads(threads)


@pytest.mark.usefixtures("any_isa")
@pytest.mark.parametrize("variant", ["gpt_oss", "mixtral_one_head", "olmoe_biased", "qwen2_moe_odd_widths"])
def test_bits_do_not_depend_on_instructions_threads_or_chunks(variant: str, make_store: MakeStore) -> None:
    with open_store(make_store(VARIANTS[variant], torch.bfloat16), max_sequences=16, threads=1) as opened:
        assert opened.runner.path == "native"
        expected = logits_of(opened, TOKENS)
        for isa in _native.available_isas():
            for threads, chunk in ((1, 5), (2, 24), (4, 64)):
                _native.set_isa(isa)
                _native.set_threads(threads)
                assert torch.equal(logits_of(opened, TOKENS, chunk=chunk), expected), (isa, threads, chunk)


def test_a_broken_token_breaks_no_neighbour(make_store: MakeStore) -> None:
    """A row of NaN still picks experts that exist, and leaves other requests' bits alone."""
    store = make_store(VARIANTS["qwen2_moe"], torch.float32)
    with open_store(store, max_sequences=2) as opened:
        expected = Feed(opened).step({0: TOKENS})[0]
    with open_store(store, max_sequences=2) as opened:
        stored(opened.skeleton.model.get_input_embeddings().weight)[1] = float("nan")
        actual = Feed(opened).step({0: TOKENS, 1: [1, 5, 1]})
    assert torch.equal(actual[0], expected)
    assert actual[1].isnan().all()


def test_no_logits_are_computed_where_none_are_wanted(make_store: MakeStore) -> None:
    with open_store(make_store(VARIANTS["mixtral"], torch.float32)) as opened:
        blocks = opened.runner.kv.allocate(1)
        batch = PackedBatch([Segment(0, TOKENS[:5], 0, blocks, False)])
        assert opened.runner.forward(batch).shape == (0, 160)


def test_time_in_kernels_is_counted(make_store) -> None:  # type: ignore[no-untyped-def]
    with open_store(make_store(VARIANTS["mixtral"], torch.float32)) as opened:
        native = opened.runner.native
        assert native is not None
        assert native.kernel_seconds == 0.0
        logits_of(opened, TOKENS)
        assert 0.0 < native.kernel_seconds < opened.runner.stats.forward_s
