"""Looking at what the base routes for a prompt: the routing of a whole pass, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.config import PackOptions
from moestro.engine.engine import ROUTED_TOKENS
from moestro.errors import RequestError
from moestro.runtime.open import OpenModel, open_model
from moestro.store.pack import pack
from moestro.trace import Recorder
from packing import pack_raw

PROMPT = list(range(5, 45))
GREEDY = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    return pack_raw(tiny_checkpoint(folder / "checkpoint"), folder / "store").path


def recorded(llm: LLM) -> np.ndarray:
    """Experts [N, L, K] of the prompt's rows, as a request has them."""
    runner = llm._open.runner
    runner.recorder = Recorder(runner.expert_counts.shape[1], keep=True)
    llm.generate(PROMPT, SamplingParams(max_tokens=1))
    trace = runner.recorder.trace()
    runner.recorder = None
    return np.sort(trace.experts_NLK[: len(PROMPT)].astype(np.int64), axis=-1)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tokens", [3, len(PROMPT)])
def test_it_is_the_routing_of_a_request(
    store: Path, native: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("moestro.engine.llm.open_model", _general)
    with LLM(store, memory="64MB") as llm:
        whole = recorded(llm)
        for layers in range(1, whole.shape[1] + 1):
            found = llm.engine.route(PROMPT[:tokens], layers)
            assert found is not None
            assert (np.sort(found, axis=-1) == whole[:tokens, :layers]).all()


def _general(*arguments: object, **options: object) -> OpenModel:
    return open_model(*arguments, **{**options, "native": False})  # type: ignore[arg-type]


def test_nothing_of_it_stays(store: Path) -> None:
    with LLM(store, memory="64MB") as llm, LLM(store, memory="64MB") as other:
        counts = llm.expert_counts()
        for layers in (1, 2):
            llm.engine.route(PROMPT, layers)
        assert llm.engine.kv_use.used == 0
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == other.generate(PROMPT, GREEDY)[0].token_ids
        assert (llm.expert_counts() >= counts).all()


def test_the_first_layer_needs_no_expert(store: Path) -> None:
    with LLM(store, memory="64MB") as llm:
        llm.engine.route(PROMPT, 1)
        stats = llm.stats()
        assert stats.bytes_read == 0
        assert (stats.domain_tokens, stats.domain_s > 0) == (len(PROMPT), True)


def test_long_prompts_are_looked_at_in_part(store: Path) -> None:
    for context, looked_at in ((512, ROUTED_TOKENS), (64, 63)):
        with LLM(store, memory="64MB", context=context) as llm:
            found = llm.engine.route([7] * 300, 1)
            assert found is not None
            assert len(found) == looked_at


def test_what_is_no_prompt_is_refused(store: Path) -> None:
    with LLM(store, memory="64MB") as llm:
        for prompt in ([], [10**6]):
            with pytest.raises(RequestError):
                llm.engine.route(prompt, 1)


def test_without_room_it_says_so(store: Path) -> None:
    with LLM(store, memory="64MB", context=64, max_sequences=1, lend_kv=False) as llm:
        running = llm.stream(PROMPT[:20], SamplingParams(max_tokens=40))
        next(running)
        assert llm.engine.route(PROMPT, 1) is None
        running.close()
        assert llm.engine.route(PROMPT, 1) is not None


def test_a_short_prompt_goes_no_further_than_it_has_to(tmp_path: Path) -> None:
    """Of a small step with everything in memory the compiled decoder would run all layers in one call."""
    store = pack(tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", options=PackOptions(calibration=False))
    with LLM(store.path, memory="64MB") as llm:
        assert llm.stats().path == "native"
        before = llm.generate(PROMPT[:8], GREEDY)[0].token_ids
        counts_LE = llm.expert_counts()
        whole = llm.engine.route(PROMPT[:8], len(counts_LE))
        for layers in range(1, len(counts_LE) + 1):
            counts_LE = llm.expert_counts()
            found = llm.engine.route(PROMPT[:8], layers)
            assert whole is not None
            assert found is not None
            assert (found == whole[:, :layers]).all()
            assert ((llm.expert_counts() - counts_LE).sum(axis=1) > 0).tolist() == [
                layer < layers - 1 for layer in range(len(counts_LE))
            ]
        assert llm.generate(PROMPT[:8], GREEDY)[0].token_ids == before
