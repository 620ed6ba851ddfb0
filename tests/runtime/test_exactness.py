"""A request's logits are the same bits whatever the budget, the cache's state, the chunks and its neighbours are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from families import FAMILIES, random_model
from opening import Feed, logits_of, open_store
from packing import pack_raw

LONG = [(7 * index * index + 3 * index + 11) % 157 + 3 for index in range(140)]
SHORT = [9, 4, 77]


def _mixtral_gelu() -> PreTrainedConfig:
    config = FAMILIES["mixtral"]()
    config.hidden_act = "gelu"
    return config


def _gpt_oss_narrow() -> PreTrainedConfig:
    config = FAMILIES["gpt_oss"]()
    config.intermediate_size = 40
    return config


def _qwen2_moe_narrow_gelu() -> PreTrainedConfig:
    config = FAMILIES["qwen2_moe"]()
    config.hidden_act, config.moe_intermediate_size = "gelu_pytorch_tanh", 24
    return config


# torch takes other paths through other activations, and through rows that are no whole number of its vectors.
CONFIGS = {
    **FAMILIES,
    "mixtral_gelu": _mixtral_gelu,
    "gpt_oss_narrow": _gpt_oss_narrow,
    "qwen2_moe_narrow_gelu": _qwen2_moe_narrow_gelu,
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    random_model(CONFIGS[request.param](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    pack_raw(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def reference(store: Path) -> dict[str, torch.Tensor]:
    with open_store(store, share=1.0, threads=1) as opened:
        return {"long": logits_of(opened, LONG), "short": logits_of(opened, SHORT)}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_budget_and_cache_state_change_no_bit(store: Path, reference: dict[str, torch.Tensor], share: float) -> None:
    with open_store(store, share=share, max_sequences=4) as opened:
        cold = logits_of(opened, LONG)
        short = logits_of(opened, SHORT)
        warm = logits_of(opened, LONG)
    assert torch.equal(cold, reference["long"])
    assert torch.equal(short, reference["short"])
    assert torch.equal(warm, reference["long"])


@pytest.mark.parametrize("chunk", [1, 13, 64])
def test_chunks_change_no_bit(store: Path, reference: dict[str, torch.Tensor], chunk: int) -> None:
    with open_store(store, share=0.25) as opened:
        assert torch.equal(logits_of(opened, LONG, chunk=chunk), reference["long"])


def test_neighbours_change_no_bit(store: Path, reference: dict[str, torch.Tensor]) -> None:
    with open_store(store, share=0.25, max_sequences=4, threads=2) as opened:
        feed = Feed(opened)
        first = feed.step({0: LONG[::-1], 1: LONG[:50], 2: SHORT[:2]})
        second = feed.step({2: SHORT[2:], 1: LONG[50:], 0: LONG[:3]})
        third = feed.step({3: SHORT})
    assert torch.equal(torch.cat([first[1], second[1]]), reference["long"])
    assert torch.equal(torch.cat([first[2], second[2]]), reference["short"])
    assert torch.equal(third[3], reference["short"])


def test_every_layer_misses_and_hits(store: Path) -> None:
    """The budget is really at work in these tests."""
    with open_store(store, share=0.5, max_sequences=2) as opened:
        logits_of(opened, LONG)
        logits_of(opened, SHORT, chunk=1)
        stats = opened.runner.planes.stats
    assert stats.misses > 0
    assert stats.evictions > 0
    assert stats.hits > 0
