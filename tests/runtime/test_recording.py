"""What a runner tells its recorder is what it computed, on both paths and for every request apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import FAMILIES, save_checkpoint
from moestro.config import SamplingParams
from moestro.engine.engine import Engine
from moestro.errors import UnsupportedModelError
from moestro.hf.skeleton import is_experts_module
from moestro.runtime.open import OpenModel
from moestro.trace import Recorder, Trace
from moestro.trace.eam import eam_of_rows
from opening import open_store
from packing import pack_raw

PROMPTS = [[5, 17, 3, 9, 9, 12, 80], [99, 42], [120, 64, 31, 77]]
NEW = 6


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a family that runs natively, and of one that does not."""
    folder = tmp_path_factory.mktemp("recording")
    for family in ("qwen3_moe", "deepseek_v3"):
        save_checkpoint(family, folder / f"{family}-checkpoint")
        pack_raw(folder / f"{family}-checkpoint", folder / family)
    return {family: folder / family for family in ("qwen3_moe", "deepseek_v3")}


def _engine(opened: OpenModel, *, together: int, step_rows: int = 64) -> Engine:
    return Engine(
        runner=opened.runner,
        max_sequences=together,
        step_rows=step_rows,
        context=256,
        end_ids=frozenset(),
        vocabulary=160,
    )


def _record(
    store: Path,
    prompts: list[list[int]],
    *,
    native: bool = True,
    together: int = 3,
    step_rows: int = 64,
    share: float = 1,
) -> tuple[Trace, list[list[int]], np.ndarray]:
    """The trace of greedy answers, the tokens of each request, and what the runner counted itself."""
    with open_store(store, native=native, max_sequences=together, share=share) as opened:
        counts_LE = opened.runner.expert_counts
        opened.runner.recorder = recorder = Recorder(counts_LE.shape[1], keep=True)
        engine = _engine(opened, together=together, step_rows=step_rows)
        sequences = [engine.submit(prompt, SamplingParams(max_tokens=NEW)) for prompt in prompts]
        while engine.busy:
            engine.step()
        tokens = [one.prompt_ids + one.token_ids[:-1] for one in sequences]
        return recorder.trace(), tokens, opened.runner.expert_counts.copy()


@pytest.mark.parametrize(("family", "native"), [("qwen3_moe", True), ("qwen3_moe", False), ("deepseek_v3", False)])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_recorded_is_the_computed(stores: dict[str, Path], family: str, native: bool, share: float) -> None:
    trace, tokens, counts_LE = _record(stores[family], PROMPTS, native=native, share=share)
    np.testing.assert_array_equal(eam_of_rows(trace.experts_NLK, trace.num_experts), counts_LE)
    assert trace.requests == len(PROMPTS)
    for request, prompt in enumerate(PROMPTS):
        rows = trace.rows_of(request)
        assert trace.token_N[rows].tolist() == tokens[request]
        assert trace.decode_N[rows].tolist() == [False] * len(prompt) + [True] * (NEW - 1)
        assert trace.meta[request] == {"prompt_tokens": len(prompt)}
        assert [one.last - one.first for one in trace.passes(request)] == [len(prompt)] + [1] * (NEW - 1)


def test_neighbours_chunks_and_memory_change_nothing(stores: dict[str, Path]) -> None:
    together, _, _ = _record(stores["qwen3_moe"], PROMPTS)
    for request, prompt in enumerate(PROMPTS):
        alone, _, _ = _record(stores["qwen3_moe"], [prompt], together=1, step_rows=3, share=0.3)
        rows = together.rows_of(request)
        np.testing.assert_array_equal(alone.experts_NLK, together.experts_NLK[rows])
        np.testing.assert_array_equal(alone.weights_NLK, together.weights_NLK[rows])
        assert max(one.last - one.first for one in alone.passes(0)) == min(3, len(prompt))


def test_both_paths_route_alike(stores: dict[str, Path]) -> None:
    native, _, _ = _record(stores["qwen3_moe"], PROMPTS)
    general, _, _ = _record(stores["qwen3_moe"], PROMPTS, native=False)
    np.testing.assert_array_equal(native.token_N, general.token_N)
    np.testing.assert_array_equal(native.experts_NLK, general.experts_NLK)
    assert np.abs(native.weights_NLK.astype(int) - general.weights_NLK).max() <= 1


def test_a_request_that_is_cancelled_ends(stores: dict[str, Path]) -> None:
    with open_store(stores["qwen3_moe"]) as opened:
        opened.runner.recorder = recorder = Recorder(opened.runner.expert_counts.shape[1], keep=True)
        engine = _engine(opened, together=1)
        started, waiting = (engine.submit(prompt, SamplingParams(max_tokens=NEW)) for prompt in PROMPTS[:2])
        engine.step()
        engine.step()
        engine.cancel(started)
        engine.cancel(waiting)
        trace = recorder.trace()
    assert trace.token_N.tolist() == [*PROMPTS[0], started.token_ids[0]]


_REFUSED = {"deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe"}
"""Families whose routers pick in groups, or not by their scores alone."""
_AHEAD = 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lookahead(family: str, tmp_path: Path) -> None:
    """Candidates begin with what the next layers' routers pick themselves when they are given the hidden state."""
    save_checkpoint(family, tmp_path / "checkpoint")
    pack_raw(tmp_path / "checkpoint", tmp_path / "store")
    with open_store(tmp_path / "store", native=False) as opened:
        routers: list[Any] = [
            next(child for name, child in block.named_children() if name in ("gate", "router"))
            for block in opened.skeleton.model.modules()
            if any(is_experts_module(child) for child in block.children())
        ]
        seen: list[torch.Tensor] = []
        hooks = [router.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for router in routers]
        opened.runner.recorder = recorder = Recorder(opened.runner.expert_counts.shape[1], keep=True)
        opened.runner.look_ahead(_AHEAD)
        engine = _engine(opened, together=1)
        engine.submit(PROMPTS[0], SamplingParams(max_tokens=1))
        if family in _REFUSED:
            with pytest.raises(UnsupportedModelError, match="without --lookahead"):
                engine.step()
            return
        engine.step()
        for hook in hooks:
            hook.remove()
        trace = recorder.trace()
        assert trace.lookahead_NPLC is not None
        candidates = min(2 * trace.picks, trace.num_experts)
        assert trace.lookahead_NPLC.shape == (len(PROMPTS[0]), _AHEAD, len(routers), candidates)
        for layer in range(len(routers)):
            for ahead in range(1, min(_AHEAD, len(routers) - 1 - layer) + 1):
                with torch.inference_mode():
                    outputs = routers[layer + ahead](seen[layer])
                (picked_TK,) = (one for one in outputs if not one.is_floating_point())
                first_TK = trace.lookahead_NPLC[:, ahead - 1, layer, : trace.picks]
                np.testing.assert_array_equal(np.sort(first_TK), np.sort(picked_TK.numpy()))
