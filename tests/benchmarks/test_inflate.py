"""An inflated model is the same model, only larger."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_checkpoint
from moestro.calibration import pack
from moestro.config import PackOptions
from moestro.store.reader import Store
from opening import logits_of, open_store

PROMPT = [5, 17, 3, 9, 9, 12, 80, 41, 2, 77]


@pytest.fixture(scope="module")
def inflate() -> Callable[[Path, Path, int], Store]:
    path = Path(__file__).parents[2] / "benchmarks" / "inflate.py"
    spec = importlib.util.spec_from_file_location("moestro_benchmark_inflate", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    made: Callable[[Path, Path, int], Store] = module.inflate
    return made


@pytest.mark.parametrize(("family", "times"), [("qwen3_moe", 2), ("qwen3_moe", 8), ("gpt_oss", 4), ("mixtral", 2)])
@pytest.mark.parametrize("options", [PackOptions(calibration=False), PackOptions(levels="raw")])
def test_the_same_logits(
    family: str, times: int, options: PackOptions, tmp_path: Path, inflate: Callable[[Path, Path, int], Store]
) -> None:
    save_checkpoint(family, tmp_path / "checkpoint")
    small = pack(tmp_path / "checkpoint", tmp_path / "small", options=options)
    large = inflate(small.path, tmp_path / "large", times)
    assert large.verify() == []
    weights = [
        sum(math.prod(t.shape) for t in one.layers[0].layout.planes[0].tensors if len(t.shape) == 2)
        for one in (small, large)
    ]
    assert weights[1] == times * weights[0]
    logits = []
    for store in (small, large):
        with open_store(store.path) as opened:
            logits.append(logits_of(opened, PROMPT))
            counts = opened.runner.expert_counts
    assert counts.sum() > 0
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_factors_that_round_are_refused(tmp_path: Path, inflate: Callable[[Path, Path, int], Store]) -> None:
    with pytest.raises(SystemExit, match="3 is not a power of two"):
        inflate(tmp_path, tmp_path / "large", 3)
    assert not (tmp_path / "large").exists()
