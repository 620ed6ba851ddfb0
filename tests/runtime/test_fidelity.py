"""With raw planes the logits are those of transformers in fp32, for every supported family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import FAMILIES, save_checkpoint
from opening import logits_of, open_store
from packing import pack_raw

PROMPT = [5, 17, 3, 99, 42, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23, 58, 101, 6, 44, 71]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path / "checkpoint")
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    pack_raw(tmp_path / "checkpoint", tmp_path / "store")
    expected, tokens = _greedy(model, PROMPT, new_tokens=12)
    with open_store(tmp_path / "store", share=0.0) as opened:
        actual = logits_of(opened, tokens[:-1])
    assert (actual - expected).abs().max() <= 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    assert expected.std() > 0.1, "the logits say nothing"


def _greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """All tokens of a greedy continuation, and the logits [T, V] that transformers computes for all but the last."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens = output[0].tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    greedy = logits[len(prompt) - 1 :].argmax(-1).tolist()
    assert greedy == tokens[len(prompt) :]
    return logits, tokens
