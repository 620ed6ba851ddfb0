"""The plan holds for layers so wide that their activations are most of the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families import random_model
from moestro.store.locate import locate_source
from packing import pack_raw
from runtime.native.variants import changed
from runtime.test_budget import LEAST

WIDE = changed(
    "olmoe",
    hidden_size=1024,
    num_hidden_layers=2,
    num_experts=10,
    num_experts_per_tok=8,
    max_position_embeddings=1024,
    vocab_size=4096,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    random_model(WIDE(), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "checkpoint" / name).write_bytes((locate_source("tiny-qwen3moe-28m") / name).read_bytes())
    pack_raw(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.mark.parametrize(("context", "sequences"), [(1024, 1), (512, 3)])
def test_the_least_memory_is_enough_for_wide_layers(store: Path, context: int, sequences: int) -> None:
    command = [sys.executable, "-c", LEAST, str(store), str(context), str(sequences), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, floor, memory, evictions = json.loads(done.stdout)
    assert evictions > 0
    assert peak <= floor + memory, f"{(peak - floor) / 2**20:.2f} MiB used of {memory / 2**20:.2f}"
