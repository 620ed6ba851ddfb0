"""The promise of one number for quantised stores, whose kernels keep scratch of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig

from families import random_model
from moestro.config import PackOptions
from moestro.store.pack import pack
from moestro.store.reader import Store
from moestro.trace import COLLECTION_NAME, CollectionFile

RUN = """
import json, sys
from pathlib import Path
from moestro.config import RuntimeOptions
from moestro.memory.budget import peak_resident_bytes
from moestro.runtime.open import open_model
from moestro.store.reader import Store
from opening import Feed, plan_of
store, level, extra = Store.open(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
options = {"context": 1024, "max_sequences": 3, "level": level, **json.loads(sys.argv[4])}
memory = plan_of(store.path, RuntimeOptions(**options)).bytes_for_experts(0) + extra
with open_model(store, RuntimeOptions(memory=str(memory), **options)) as opened:
    feed = Feed(opened, every_row=False)
    for start in range(0, 1000, 500):
        for request in range(3):
            feed.step({request: [(7 * row + 31 * request) % 150 + 3 for row in range(start, start + 500)]})
    for _ in range(10):
        feed.step({request: [5 + request] for request in range(3)})
    for request in range(3):
        opened.runner.end_request(request)
    if opened.history is not None:
        opened.history.save()
    plan, stats = opened.plan, opened.runner.planes.stats
    print(json.dumps([peak_resident_bytes(), plan.floor_bytes, plan.memory_bytes, stats.evictions]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 16 to 50 KiB, by level."""
    folder = tmp_path_factory.mktemp("wide")
    config = Qwen3MoeConfig(
        vocab_size=160,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=128,
        num_experts=20,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
    )
    random_model(config, dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=PackOptions(calibration=False)).path


@pytest.mark.parametrize(("level", "extra"), [(2, 0), (8, 0), (4, 256 << 10)])
def test_peak_memory_stays_within_floor_plus_budget(store: Path, level: int, extra: int) -> None:
    """With the least memory in which all contexts have room, and with a little more."""
    _run(store, level, extra, {})


def test_so_does_that_of_one_that_remembers_requests(store: Path, tmp_path: Path) -> None:
    """With as many past requests as are ever kept."""
    opened = Store.open(Path(shutil.copytree(store, tmp_path / "store")))
    kept = CollectionFile(
        opened.path / COLLECTION_NAME, model=opened.manifest.source.fingerprint, layers=2, experts=20, capacity=256
    )
    counts_nLE = np.random.default_rng(0).integers(0, 999, (256, 2, 20))
    for counts_LE in counts_nLE:
        kept.prefill.insert(counts_LE)
        kept.decode.insert(counts_LE)
    kept.save()
    _run(opened.path, 4, 0, {"policy": "moe_infinity", "predictor": "eamc+gate"})


def _run(store: Path, level: int, extra: int, options: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", RUN, str(store), str(level), str(extra), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, floor, memory, evictions = json.loads(done.stdout)
    assert evictions > 0
    assert peak <= floor + memory, f"{(peak - floor) / 2**20:.2f} MiB used of {memory / 2**20:.2f}"
