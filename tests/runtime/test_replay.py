"""Replayed routing is what the model runs with, on both paths; a trace's own routing changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import save_checkpoint
from moestro.config import PackOptions
from moestro.errors import TraceError
from moestro.runtime.batch import Segment
from moestro.runtime.open import OpenModel
from moestro.runtime.replay import Replay
from moestro.store.pack import pack
from moestro.trace import Recorder, Trace
from opening import Feed, open_store
from packing import pack_raw

PROMPTS = {0: [5, 17, 3, 9, 9, 12, 80], 1: [99, 42]}
NEXT = [11, 64, 120, 31]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of families whose weights add up to 1; one runs natively, the other in general."""
    folder = tmp_path_factory.mktemp("replay")
    for family in ("qwen3_moe", "deepseek_v3"):
        save_checkpoint(family, folder / f"{family}-checkpoint")
        pack_raw(folder / f"{family}-checkpoint", folder / family)
    return {family: folder / family for family in ("qwen3_moe", "deepseek_v3")}


def _replay(opened: OpenModel, trace: Trace) -> Replay:
    experts = [layer.num_experts for layer in opened.skeleton.expert_layers]
    return Replay(trace, experts=experts, picks=[trace.picks] * len(experts))


def _run(opened: OpenModel, prompts: dict[int, list[int]] = PROMPTS) -> tuple[torch.Tensor, Trace]:
    """Logits of requests, prompts and then some tokens together, and what was routed."""
    opened.runner.recorder = recorder = Recorder(8, keep=True)
    feed = Feed(opened)
    logits = list(feed.step(prompts).values())
    for token in NEXT:
        logits += feed.step({request: [token] for request in prompts}).values()
    for request in prompts:
        recorder.end(request)
    return torch.cat(logits), recorder.trace()


def _other(trace: Trace) -> Trace:
    """The same rows, other experts."""
    return replace(trace, experts_NLK=((trace.experts_NLK.astype(np.int64) + 3) % 8).astype(np.uint8))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_replayed_is_what_runs(family: str, native: bool, share: float, stores: dict[str, Path]) -> None:
    with open_store(stores[family], native=native, max_sequences=2) as opened:
        own_logits, own = _run(opened)
    replayed = {}
    for name, trace in {"own": own, "other": _other(own)}.items():
        with open_store(stores[family], native=native, max_sequences=2, share=share) as opened:
            opened.runner.replay_routing(_replay(opened, trace))
            logits, seen = _run(opened)
            np.testing.assert_array_equal(seen.experts_NLK, trace.experts_NLK)
            np.testing.assert_allclose(seen.weights_NLK.astype(int), trace.weights_NLK, atol=2)
            counts_LE = opened.runner.expert_counts
            for layer in range(trace.layers):
                wanted = np.bincount(trace.experts_NLK[:, layer].ravel(), minlength=8)
                np.testing.assert_array_equal(counts_LE[layer], wanted)
            replayed[name] = logits
    # Weights of a trace have 8 bits; deepseek's are larger by a factor, which no trace has.
    if family == "qwen3_moe":
        torch.testing.assert_close(replayed["own"], own_logits, rtol=0, atol=0.15)
    assert float((replayed["other"] - replayed["own"]).abs().max()) > 0.2


def test_both_paths_replay_alike(stores: dict[str, Path]) -> None:
    found = []
    with open_store(stores["qwen3_moe"], max_sequences=2) as opened:
        _, own = _run(opened)
    for native in (True, False):
        with open_store(stores["qwen3_moe"], native=native, max_sequences=2) as opened:
            opened.runner.replay_routing(_replay(opened, _other(own)))
            found.append(_run(opened)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompts", [PROMPTS, {0: PROMPTS[0]}])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_compiled_passes_run_what_is_replayed(share: float, prompts: dict[int, list[int]], tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path / "checkpoint")
    store = pack(tmp_path / "checkpoint", tmp_path / "store", options=PackOptions(calibration=False)).path
    with open_store(store, max_sequences=2) as opened:
        _, own = _run(opened, prompts)
    found = []
    for native in (True, False):
        with open_store(store, native=native, max_sequences=2, share=share) as opened:
            opened.runner.replay_routing(_replay(opened, _other(own)))
            logits, seen = _run(opened, prompts)
            np.testing.assert_array_equal(seen.experts_NLK, _other(own).experts_NLK)
            found.append(logits)
            if opened.runner.native is not None:
                assert opened.runner.native.experts_seconds > 0, "the decoder came back for all experts"
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def _trace(rows: int = 6, layers: int = 2) -> Trace:
    experts_NLK = np.stack([np.arange(rows) % 4, np.arange(rows) % 4 + 1], -1)[:, None].repeat(layers, 1)
    return Trace(
        experts_NLK=experts_NLK.astype(np.uint8),
        weights_NLK=np.full((rows, layers, 2), (170, 85), dtype=np.uint8),
        token_N=np.zeros(rows, dtype=np.int32),
        offsets_R1=np.array([0, 2, rows], dtype=np.int64),
        meta=({}, {}),
        num_experts=5,
        decode_N=np.ones(rows, dtype=bool),
    )


def test_rows_follow_each_other_and_come_round() -> None:
    replay = Replay(_trace(), experts=[5, 5], picks=[2, 2])
    replay.begin([Segment(0, [1] * 3, 0, (0,), True), Segment(1, [1], 5, (1,), True), Segment(2, [1], 0, (2,), True)])
    ids_TK, weights_TK = replay.layer(1)
    # Request 0 begins at row 0, request 1 at row 2 (and is 5 further), request 2 where request 0 did.
    assert ids_TK[:, 0].tolist() == [0, 1, 2, 1, 0]
    assert ids_TK.dtype == np.int64
    assert weights_TK.dtype == np.float32
    np.testing.assert_allclose(weights_TK[0], [2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("experts", "picks"), [([5, 5, 5], [2, 2, 2]), ([6, 6], [2, 2]), ([5, 5], [1, 1]), ([5, 6], [2, 2])]
)
def test_a_trace_of_another_shape_is_refused(experts: list[int], picks: list[int]) -> None:
    words = f"is of 2 MoE layers with 2 of 5 experts for a token; this model has {len(experts)} with {picks[0]} of"
    with pytest.raises(TraceError, match=re.escape(words)):
        Replay(_trace(), experts=experts, picks=picks)
