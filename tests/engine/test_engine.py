"""The engine's loop: a plane that cannot be read ends the requests that need it, and no others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from families import save_checkpoint
from moestro.config import SamplingParams
from moestro.engine.engine import Engine
from moestro.engine.sequence import Sequence
from moestro.errors import PlaneReadError, RequestError
from moestro.runtime.open import OpenModel
from moestro.store.reader import Store
from opening import open_store
from packing import pack_raw

PROMPTS = [[5, 17, 3], [99, 42], [120, 64, 31, 77]]
GREEDY = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_checkpoint("qwen3_moe", folder / "checkpoint")
    pack_raw(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.fixture
def opened(store: Path) -> Iterator[OpenModel]:
    with open_store(store, share=0.5, max_sequences=3) as model:
        yield model


def _engine(opened: OpenModel) -> Engine:
    return Engine(runner=opened.runner, max_sequences=3, step_rows=64, context=256, end_ids=frozenset(), vocabulary=160)


def _run(engine: Engine, prompts: list[list[int]]) -> list[Sequence]:
    sequences = [engine.submit(prompt, GREEDY) for prompt in prompts]
    for _ in range(200):
        if not engine.busy:
            return sequences
        engine.step()
    raise AssertionError("the engine does not come to an end")


def _experts_used(opened: OpenModel, prompt: list[int]) -> set[tuple[int, int]]:
    before = opened.runner.expert_counts.copy()
    _run(_engine(opened), [prompt])
    used = np.argwhere(opened.runner.expert_counts > before)
    return {(int(layer), int(expert)) for layer, expert in used}


def test_a_damaged_plane_fails_the_requests_that_need_it_alone(store: Path, opened: OpenModel, tmp_path: Path) -> None:
    used = [_experts_used(opened, prompt) for prompt in PROMPTS]
    healthy = _run(_engine(opened), PROMPTS)
    layer, expert = sorted(used[0] - used[1] - used[2])[0]
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    extent = Store.open(damaged).plane((layer, expert, 0))
    with extent.file.open("r+b") as file:
        file.seek(extent.offset + 100)
        byte = file.read(1)[0]
        file.seek(extent.offset + 100)
        file.write(bytes([byte ^ 1]))
    with open_store(damaged, share=0.5, max_sequences=3) as model:
        sequences = _run(_engine(model), PROMPTS)
        again = _run(_engine(model), PROMPTS[1:])
        assert model.runner.kv.free_blocks == model.runner.kv.blocks
    assert sequences[0].finish_reason == "error"
    assert isinstance(sequences[0].error, PlaneReadError)
    assert f"expert {expert} of MoE layer {layer}" in str(sequences[0].error)
    assert sequences[0].error.key == (layer, expert, 0)
    for sequence, other, repeated in zip(sequences[1:], healthy[1:], again, strict=True):
        assert sequence.finish_reason == "length"
        assert sequence.token_ids == other.token_ids == repeated.token_ids


def test_a_cancelled_request_leaves_the_others_alone(opened: OpenModel) -> None:
    alone = _run(_engine(opened), PROMPTS[:1])[0]
    engine = _engine(opened)
    kept, cancelled = (engine.submit(prompt, GREEDY) for prompt in PROMPTS[:2])
    engine.step()
    engine.cancel(cancelled)
    while engine.busy:
        engine.step()
    assert kept.token_ids == alone.token_ids
    assert len(cancelled.token_ids) == 1
    assert opened.runner.kv.free_blocks == opened.runner.kv.blocks


@pytest.mark.parametrize(
    ("prompt", "says"), [([], "empty"), ([160], "vocabulary"), ([-1], "vocabulary"), ([1] * 256, "context holds 256")]
)
def test_bad_prompts_are_refused(opened: OpenModel, prompt: list[int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        _engine(opened).submit(prompt, GREEDY)
