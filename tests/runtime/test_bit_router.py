"""The level policy of a bit router: the same tokens whatever the memory, exact rows exact, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.checkpoints import save_with_tokenizer, write_text
from moestro.bit_router import BIT_ROUTER_FILE
from moestro.calibration import pack
from moestro.calibration.bit_router import BitRouterTraining
from moestro.calibration.bit_router_packing import add_bit_router
from moestro.config import PackOptions, RuntimeOptions
from moestro.errors import RequestError, StoreError
from moestro.policy.levels import QUALITIES
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel
from opening import open_store, plan_of

IDS = [5, 17, 3, 99, 42, 8, 12, 9, 4, 77, 31, 64, 5, 5, 90]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_with_tokenizer(request.param, folder / "checkpoint")
    text = str(write_text(folder / "text.txt"))
    store = pack(folder / "checkpoint", folder / "store", options=PackOptions(calibrate=text))
    add_bit_router(store, text=text, training=BitRouterTraining(steps=4, tokens=24, held_out=2))
    return store.path


def _open(folder: Path, share: float, **options: object) -> OpenModel:
    return open_store(folder, share=share, max_sequences=2, **{"level_policy": "learned", **options})


def _logits(opened: OpenModel, quality: str, chunk: int, *, beside: bool = False) -> torch.Tensor:
    """[T, V] of IDS fed in chunks, with exact rows of another request beside them if asked for."""
    runner = opened.runner
    blocks, others = (runner.kv.allocate(blocks_for(len(IDS))) for _ in range(2))
    found = []
    for start in range(0, len(IDS), chunk):
        ids = IDS[start : start + chunk]
        segments = [Segment(0, ids, start, blocks, True, True, QUALITIES[quality])]
        if beside:
            segments.append(Segment(1, ids[::-1], start, others, True, True, 0.0))
        found.append(runner.forward(PackedBatch(segments, every_row=True))[: len(ids)])
    for one in (blocks, others):
        runner.kv.release(one)
    return torch.cat(found)


@pytest.mark.parametrize("native", [True, False])
def test_results_depend_on_neither_memory_nor_neighbours(folder: Path, native: bool) -> None:
    found = []
    for share, chunk, beside in ((0.3, 1, False), (0.3, 15, False), (0.6, 4, True), (1.0, 1, False), (1.0, 5, True)):
        with _open(folder, share, native=native) as opened:
            found.append(_logits(opened, "fast", chunk, beside=beside))
            applied = opened.runner.levels_applied
            uses = len(opened.runner.expert_counts) * opened.skeleton.config.num_experts_per_tok
            assert applied["4"] < sum(applied.values()) == len(IDS) * uses
    assert all(torch.equal(one, found[0]) for one in found[1:])
    with _open(folder, 1.0, native=native) as opened:
        assert not torch.equal(_logits(opened, "exact", 1), found[0])


def test_exact_rows_are_exact_before_and_after(folder: Path) -> None:
    with _open(folder, 1.0, level_policy="fixed") as opened:
        wanted = _logits(opened, "exact", 5)
    with _open(folder, 1.0) as opened:
        assert torch.equal(_logits(opened, "exact", 5), wanted)
        _logits(opened, "fast", 1)
        assert torch.equal(_logits(opened, "exact", 1), wanted)
        assert torch.equal(_logits(opened, "exact", 5), wanted)


def test_less_is_read(folder: Path) -> None:
    read = {}
    for quality in ("exact", "fast"):
        with _open(folder, 0.4) as opened:
            _logits(opened, quality, 1)
            read[quality] = opened.runner.planes.stats.bytes_read
    assert read["fast"] < read["exact"]


def test_its_bytes_are_in_the_plan(folder: Path) -> None:
    learned, fixed = (plan_of(folder, RuntimeOptions(context=64, level_policy=one)) for one in ("learned", "fixed"))
    more = learned.staging_bytes - fixed.staging_bytes
    assert more >= (folder / BIT_ROUTER_FILE).stat().st_size


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a number"):
        _open(folder, 1.0, quality="0.01")
    with pytest.raises(RequestError, match="trained for level 4"):
        _open(folder, 1.0, level=3)
    copy = tmp_path / "store"
    copy.mkdir()
    for one in folder.iterdir():
        if one.name != BIT_ROUTER_FILE:
            (copy / one.name).symlink_to(one)
    with pytest.raises(RequestError, match="--bit-router"):
        _open(copy, 1.0)
    (copy / BIT_ROUTER_FILE).write_bytes(b"no router")
    with pytest.raises(StoreError, match="--bit-router"):
        _open(copy, 1.0)
    with _open(copy, 1.0, level_policy="auto") as opened:
        assert opened.level_policy == "ledger"
