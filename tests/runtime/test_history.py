"""What a model remembers of requests: in its store, within its memory, and never in the way of serving."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from families import save_checkpoint
from moestro.config import RuntimeOptions, SamplingParams
from moestro.engine.engine import Engine
from moestro.errors import RequestError, TraceError
from moestro.policy.observation import Shape
from moestro.runtime.history import history_bytes
from moestro.runtime.open import OpenModel
from moestro.store.reader import Store
from moestro.trace import COLLECTION_NAME, CollectionFile
from opening import open_store, plan_of
from packing import pack_raw

PROMPTS = [[5, 17, 3, 9, 9, 12, 80], [99, 42], [120, 64, 31, 77]]
BY_HISTORY = {"policy": "moe_infinity", "predictor": "eamc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint("qwen3_moe", tmp_path / "checkpoint")
    pack_raw(tmp_path / "checkpoint", tmp_path / "store")
    return tmp_path / "store"


def _serve(opened: OpenModel) -> None:
    """Answers to all prompts, one after another."""
    engine = Engine(
        runner=opened.runner, max_sequences=1, step_rows=64, context=256, end_ids=frozenset(), vocabulary=160
    )
    for prompt in PROMPTS:
        engine.submit(prompt, SamplingParams(max_tokens=5))
    while engine.busy:
        engine.step()


def _kept(folder: Path) -> CollectionFile:
    store = Store.open(folder)
    most = max(layer.num_experts for layer in store.layers)
    model = store.manifest.source.fingerprint
    return CollectionFile(folder / COLLECTION_NAME, model=model, layers=len(store.layers), experts=most)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("native", [True, False])
def test_requests_are_remembered_by_the_next_run(folder: Path, native: bool) -> None:
    with open_store(folder, share=0.4, native=native, **BY_HISTORY) as opened:
        assert opened.history is not None
        assert len(opened.history.collections.decode) == 0
        _serve(opened)
        counts_LE = opened.runner.expert_counts.copy()
    kept = _kept(folder)
    assert len(kept.prefill) == len(kept.decode) == len(PROMPTS)
    assert kept.prefill.ids_n.tolist() == kept.decode.ids_n.tolist()
    total_LE = kept.prefill.all_counts().sum(0) + kept.decode.all_counts().sum(0)
    np.testing.assert_array_equal(total_LE, counts_LE)
    with open_store(folder, share=0.4, native=native, **BY_HISTORY) as opened:
        assert opened.history is not None
        assert opened.history.collections.decode.ids_n.tolist() == kept.decode.ids_n.tolist()
        _serve(opened)
    assert len(_kept(folder).decode) == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    ("options", "stored", "active"),
    [
        ({}, False, False),
        ({"learn": "on"}, True, True),
        ({"policy": "lru", "predictor": "eamc", "prefetch": "off"}, False, False),
        ({"policy": "lru", "predictor": "recency+eamc"}, True, True),
        ({"policy": "value", "predictor": "eamc", "prefetch": "off"}, True, True),
        ({"policy": "moe_infinity", "learn": "off"}, False, True),
    ],
)
def test_what_is_learned_when(folder: Path, options: dict[str, str], stored: bool, active: bool) -> None:
    with open_store(folder, share=0.4, **options) as opened:
        _serve(opened)
        assert (opened.history is not None) == active
        if opened.history is not None:
            assert len(opened.history.collections.decode) == len(PROMPTS)
    assert (folder / COLLECTION_NAME).exists() == stored


def test_with_everything_in_memory_nothing_is_learned(folder: Path) -> None:
    with open_store(folder, share=1.0, learn="on") as opened:
        _serve(opened)
        assert opened.history is None
        assert opened.runner.recorder is None
    assert not (folder / COLLECTION_NAME).exists()


def test_it_is_saved_while_the_model_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.runtime.history._SAVE_EVERY_S", 0.0)
    with open_store(folder, share=0.4, learn="on") as opened:
        _serve(opened)
        assert len(_kept(folder).decode) == len(PROMPTS)


def test_two_models_lose_nothing_of_each_other(folder: Path) -> None:
    with open_store(folder, share=0.4, learn="on") as one, open_store(folder, share=0.4, learn="on") as other:
        _serve(one)
        _serve(other)
    assert len(_kept(folder).decode) == 2 * len(PROMPTS)


def test_a_folder_that_cannot_be_written_is_named_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("moestro.runtime.history._SAVE_EVERY_S", 0.0)
    (folder / f"{COLLECTION_NAME}.lock").mkdir()  # whoever may do everything cannot open it either
    with open_store(folder, share=0.4, learn="on") as opened:
        _serve(opened)
        _serve(opened)
        assert opened.history is not None
        assert len(opened.history.collections.decode) == 2 * len(PROMPTS)
    (said,) = _said(caplog)
    assert f"{folder / COLLECTION_NAME} cannot be written" in said
    assert "learn off" in said


def test_a_damaged_file_is_set_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / COLLECTION_NAME).write_bytes(b"damaged")
    with open_store(folder, share=0.4, **BY_HISTORY) as opened:
        _serve(opened)
    (said,) = _said(caplog)
    assert "requests.npz.damaged-1" in said
    assert len(_kept(folder).decode) == len(PROMPTS)


def test_one_of_another_model_is_refused_by_name(folder: Path) -> None:
    other = CollectionFile(folder / COLLECTION_NAME, model="another", layers=2, experts=4)
    other.decode.insert(np.ones((2, 4), np.int64))
    other.save()
    with (
        pytest.raises(TraceError, match=r"requests\.npz is of another model \(another\)"),
        open_store(folder, share=0.4, learn="on"),
    ):
        pass
    with open_store(folder, share=0.4) as opened:  # who does not ask for it is not bothered
        _serve(opened)


def test_its_bytes_are_part_of_the_plan(folder: Path) -> None:
    usual, learning = (plan_of(folder, RuntimeOptions(context=256, learn=learn)) for learn in ("off", "on"))
    store = Store.open(folder)
    picks = int(store.config_dict["num_experts_per_tok"])
    shape = Shape(len(store.layers), max(layer.num_experts for layer in store.layers), picks)
    expected = history_bytes(shape, step_rows=usual.step_rows, max_sequences=1)
    assert learning.staging_bytes - usual.staging_bytes == expected
    assert plan_of(folder, RuntimeOptions(context=256, policy="moe_infinity", learn="off")).staging_bytes >= expected


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(RequestError, match="learn is 'maybe', expected auto, on or off"):
        RuntimeOptions(learn="maybe")
