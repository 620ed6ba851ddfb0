"""KV blocks and experts trade places: never more bytes than were given, never another token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro import LLM, SamplingParams
from moestro.errors import BudgetError
from moestro.memory.pages import mapping_usage
from moestro.runtime.plan import Plan
from moestro.runtime.shares import MemoryShares, least_kv_blocks
from moestro.store.checksum import checksum

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
OPENED = {"memory": "64MiB", "context": 512, "max_sequences": 8}


@pytest.fixture(scope="module")
def store(raw_store: Path) -> Path:
    return raw_store


@pytest.fixture
def llm(store: Path) -> Iterator[LLM]:
    with LLM(store, **OPENED) as opened:
        yield opened


def _shares(llm: LLM) -> MemoryShares:
    return llm._model.shares


def _within(llm: LLM) -> None:
    """What is resident of both buffers is never more than the plan gave them."""
    shares, plan = _shares(llm), llm.plan
    assert shares.arena_bytes >= plan.arena_bytes - plan.extent_bytes
    assert shares.kv_bytes <= plan.kv_bytes
    assert shares.arena_bytes + shares.kv_bytes <= plan.arena_bytes + plan.kv_bytes
    resident = sum(
        mapping_usage(buffer.address, buffer.address + buffer.nbytes).resident for buffer in llm._model.buffers[1:]
    )
    # A mapping is listed with the page before ours and what the kernel shows of its neighbours.
    assert resident <= plan.arena_bytes + plan.kv_bytes + (64 << 10)


def _prompts(count: int, tokens: int) -> list[list[int]]:
    return [[(7 * place + 31 * number) % 4000 for place in range(tokens)] for number in range(count)]


def test_short_requests_leave_the_memory_of_long_ones_to_experts(llm: LLM, store: Path) -> None:
    assert _shares(llm).kv_bytes < llm.plan.kv_bytes // 4
    lent = llm.stats().arena_bytes - llm.plan.arena_bytes
    assert lent > llm.plan.kv_bytes // 2
    llm.generate(_prompts(8, 20), SHORT)
    assert llm.stats().arena_bytes - llm.plan.arena_bytes > llm.plan.kv_bytes // 2
    _within(llm)


def test_long_contexts_take_it_and_give_it_back(llm: LLM, store: Path) -> None:
    before = llm.generate(_prompts(8, 20), SHORT)
    at_first = llm.stats().arena_bytes
    long = SamplingParams(max_tokens=20, ignore_eos=True)
    crowded = llm.generate(_prompts(8, 490), long)
    assert llm.stats().arena_bytes <= llm.plan.arena_bytes
    assert llm.stats().kv_bytes == llm.plan.kv_bytes
    _within(llm)
    for _ in range(6):
        again = llm.generate(_prompts(8, 20), SHORT)
        _within(llm)
    assert llm.stats().arena_bytes == at_first
    assert [one.token_ids for one in again] == [one.token_ids for one in before]
    with LLM(store, lend_kv=False, prefix_cache=False, **OPENED) as fixed:
        assert fixed.stats().arena_bytes == fixed.plan.arena_bytes
        apart = fixed.generate(_prompts(8, 490), long)
    assert [one.token_ids for one in crowded] == [one.token_ids for one in apart]


def test_prefixes_survive_where_there_is_room(llm: LLM) -> None:
    prompt = _prompts(1, 100)[0]
    llm.generate(prompt, SHORT)
    assert llm.generate(prompt, SHORT)[0].cached_tokens == 96
    llm.generate(_prompts(8, 490)[1:], SHORT)
    _within(llm)


def test_the_least_is_a_quarter_of_a_context(llm: LLM) -> None:
    plan: Plan = llm.plan
    assert _shares(llm).least_blocks == least_kv_blocks(plan) == 512 // 16 // 4


def test_planes_that_move_keep_their_bytes_and_the_worthiest_stay(llm: LLM) -> None:
    llm.generate(_prompts(8, 30), SHORT)
    planes, buffer = llm._model.runner.planes, llm._model.arena_buffer
    before, full = planes.resident(), planes.nbytes
    for nbytes in (full * 3 // 4, full // 3, full // 2, full // 5, full):
        planes.resize(nbytes)
        assert planes.nbytes <= nbytes
        held = planes._planes.by_key
        assert held.keys() <= before
        assert sum(plane.slot.nbytes for plane in held.values()) <= planes.nbytes
        for plane in held.values():
            assert plane.slot.offset + plane.nbytes <= planes.nbytes
            extent = llm._model.store.plane(plane.key)
            assert checksum(buffer.view(plane.slot.offset, plane.nbytes)) == extent.checksum
    # A fifth was full: nothing had to leave that another could have taken the place of.
    assert len(held) * 196608 > full // 5 - llm.plan.extent_bytes
    again = llm.generate(_prompts(8, 30), SHORT)
    llm.engine.forget()
    assert [one.token_ids for one in llm.generate(_prompts(8, 30), SHORT)] == [one.token_ids for one in again]


@pytest.mark.parametrize("lend_kv", [True, False])
def test_the_number_can_be_made_smaller_and_what_it_was(store: Path, lend_kv: bool) -> None:
    with LLM(store, lend_kv=lend_kv, **OPENED) as llm:
        given, arena = llm.plan.memory_bytes, llm.stats().arena_bytes
        before = llm.generate(_prompts(8, 30), SHORT)
        llm.resize(given - (5 << 20))
        assert arena - (8 << 20) < llm.stats().arena_bytes <= arena - (5 << 20)
        assert llm.stats().memory_bytes == given - (5 << 20)
        llm.generate(_prompts(8, 490), SHORT)
        assert llm.stats().arena_bytes <= llm.plan.arena_bytes - (5 << 20)
        assert [one.token_ids for one in llm.generate(_prompts(8, 30), SHORT)] == [one.token_ids for one in before]
        llm.resize(given)
        llm.engine.forget()
        assert llm.stats().arena_bytes == arena
        for wrong in (given + 1, llm.plan.least_bytes - 1):
            with pytest.raises(BudgetError, match=f"to {given} bytes"):
                llm.resize(wrong)
        assert llm.stats().memory_bytes == given


PEAK = """
import json, sys
from moestro import LLM, SamplingParams
with LLM(sys.argv[1], memory="56MiB", context=512, max_sequences=6) as llm:
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    for tokens in (20, 500, 20, 20, 20, 20, 250, 500, 30):
        prompts = [[(7 * i + 31 * n + tokens) % 4000 for i in range(tokens)] for n in range(6)]
        llm.generate(prompts, sampling)
    stats = llm.stats()
    trades = llm._model.shares.trades
print(json.dumps([stats.peak_rss_bytes, stats.process_floor_bytes, stats.memory_bytes, trades]))
"""


def test_peak_memory_stays_within_what_was_given(store: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, str(store)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, floor, memory, trades = json.loads(done.stdout)
    assert trades
    assert peak <= floor + memory, f"{(peak - floor) / 2**20:.2f} MiB used of {memory / 2**20:.2f}"
