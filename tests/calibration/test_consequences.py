"""What errors of a layer do to the logits, against transformers' own gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoints import save_with_tokenizer, write_text
from moestro.calibration import calibrator, consequences, pack
from moestro.config import PackOptions
from moestro.hf.skeleton import is_experts_module
from moestro.store.expert_work import ExpertWork


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_metrics_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_with_tokenizer(family, tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    seen: list[Any] = []
    real = calibrator.kept_metrics

    def metrics(work: ExpertWork, sequences: Any, identity: str) -> list[torch.Tensor]:
        found = real(work, sequences, identity)
        with monkeypatch.context() as within:
            within.setattr(consequences, "output_metrics", None)  # what has been kept is not computed again
            again = real(work, sequences, identity)
        seen.append((sequences, found, again))
        return found

    monkeypatch.setattr(calibrator, "kept_metrics", metrics)
    pack(tmp_path / "source", tmp_path / "store", options=PackOptions(calibrate=str(text)))
    ((sequences, found, again),) = seen
    wanted = _metrics_of(model, sequences)
    for layer, (own, other, kept) in enumerate(zip(found, wanted, again, strict=True)):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=f"layer {layer}")
        assert torch.equal(own, kept)


def _metrics_of(model: Any, sequences: Any) -> list[torch.Tensor]:
    """By hooks on the experts' outputs, every batch's tokens drawn with its number as the seed."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    outputs: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    sums = [torch.zeros(()) for _ in modules]
    batches = consequences.cut_batches(sequences)
    assert len(batches) < len(sequences)
    for number, ids in enumerate(batches):
        outputs.clear()
        log = model(input_ids=ids).logits.flatten(0, 1).float().log_softmax(-1)
        drawn = torch.multinomial(log.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        gradients = torch.autograd.grad(log.gather(1, drawn).sum(), outputs)
        for layer, gradient in enumerate(gradients):
            rows = gradient.reshape(-1, gradient.shape[-1])
            sums[layer] = sums[layer] + rows.T @ rows
    for handle in handles:
        handle.remove()
    return [one / sum(map(len, sequences)) for one in sums]


def test_batches_are_of_one_length() -> None:
    lengths = [300, 256, 400, 9, 256, 10, 10, 10, 10, 10]
    batches = consequences.cut_batches([tuple(range(length)) for length in lengths])
    assert [tuple(ids.shape) for ids in batches] == [(3, 256), (1, 9), (1, 256), (4, 10), (1, 10)]
    assert (
        sum(len(ids) for ids in consequences.cut_batches([(1,) * 512] * 100)) * consequences.PIECE == consequences.ROWS
    )
