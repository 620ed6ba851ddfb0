"""Perplexity and divergence are those that transformers' logits give, whatever the memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.perturbed import MODEL, TEXT, perturbed_checkpoint
from engine.tiny import tiny_checkpoint
from moestro.config import PackOptions, RuntimeOptions
from moestro.engine.evaluate import EvaluationProgress, evaluate
from moestro.engine.results import Evaluation
from moestro.engine.windows import Text, cut_windows
from moestro.errors import BudgetError, RequestError
from moestro.runtime.subject import Subject
from moestro.store.locate import locate_source
from moestro.store.pack import pack
from packing import pack_raw

TEXTS = [Text("code and words", TEXT), Text("words", TEXT[200:])]
WINDOW = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed_checkpoint(tmp_path_factory.mktemp("perturbed") / "checkpoint")


@pytest.fixture(scope="module")
def raw(shipped: Path) -> Path:
    return shipped


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    return pack_raw(checkpoint, checkpoint.parent / "store").path


def _measure(store: Path, raw: Path | None = None, memory: str = "100MiB", *, one_by_one: bool = False) -> Evaluation:
    options = RuntimeOptions(memory=memory)
    return evaluate(store, TEXTS, reference_path=raw, options=options, window=WINDOW, one_by_one=one_by_one)


def _expected(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities [tokens, vocabulary] of all scored tokens by transformers, and the loss that it computes."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows, losses = [], []
    for one in cut_windows(AutoTokenizer.from_pretrained(checkpoint), TEXTS, window=WINDOW):
        ids = torch.tensor([one.token_ids])
        with torch.inference_mode():
            output = model(ids, labels=ids)
        rows.append(torch.log_softmax(output.logits[0, :-1].double(), -1))
        losses.append(output.loss.double())
    return torch.cat(rows), torch.stack(losses)


def test_loss_and_divergence_are_those_of_transformers(
    store: Path, raw: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "moestro"):
        measured = _measure(store, raw)
    assert "another checkpoint" in caplog.text
    ours, losses = _expected(checkpoint)
    exact, raw_losses = _expected(locate_source(MODEL))
    assert measured.loss == pytest.approx(losses.mean().item(), abs=1e-4)
    assert measured.perplexity == math.exp(measured.loss)
    assert measured.raw_perplexity == pytest.approx(raw_losses.mean().exp().item(), rel=1e-4)
    divergence = (exact.exp() * (exact - ours)).sum(-1)
    assert measured.kl_to_raw == pytest.approx(divergence.mean().item(), abs=1e-4)
    assert measured.kl_to_raw > 0.01, "the two models are alike"
    assert measured.same_choice == pytest.approx((exact.argmax(-1) == ours.argmax(-1)).double().mean().item(), abs=0.01)
    assert measured.tokens == len(exact) == measured.windows * (WINDOW - 1)
    assert sum(text.tokens for text in measured.texts) == measured.tokens
    assert measured.kl_to_raw == pytest.approx(
        sum(text.tokens * (text.kl_to_raw or 0) for text in measured.texts) / measured.tokens
    )


def test_the_reference_is_at_no_distance_from_itself(raw: Path) -> None:
    beside_itself = _measure(raw, raw)
    assert (beside_itself.kl_to_raw, beside_itself.same_choice) == (0.0, 1.0)
    assert beside_itself.raw_perplexity == beside_itself.perplexity
    assert beside_itself.bits_per_weight == 16.0
    assert (beside_itself.level, beside_itself.dense_bits) == (16, 16)


def test_the_figures_do_not_depend_on_the_memory(store: Path, raw: Path) -> None:
    plenty = _measure(store, raw)
    with pytest.raises(BudgetError, match="side by side") as refused:
        _measure(store, raw, "20MiB")
    least = str(refused.value).split("(")[1].split(" ")[0]
    scarce = _measure(store, raw, least)
    assert (scarce.memory_bytes, scarce.texts) == (int(least), plenty.texts)
    assert (scarce.loss, scarce.kl_to_raw, scarce.same_choice) == (plenty.loss, plenty.kl_to_raw, plenty.same_choice)


def test_chunks_of_a_window_do_not_matter(store: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _measure(store, raw)
    monkeypatch.setattr("moestro.engine.evaluate._LOGIT_BYTES", 7 * 4096 * 4)
    chunked = _measure(store, raw)
    assert chunked.tokens == whole.tokens
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-12)
    assert chunked.kl_to_raw == pytest.approx(whole.kl_to_raw, rel=1e-9)


def test_tokens_fed_one_by_one_are_scored_the_same(store: Path, raw: Path) -> None:
    whole, single = _measure(store, raw), _measure(store, raw, one_by_one=True)
    assert single.tokens == whole.tokens
    # The logits are the same, bit for bit; the sums over them are taken in other groups.
    assert single.loss == pytest.approx(whole.loss, rel=1e-12)
    assert single.kl_to_raw == pytest.approx(whole.kl_to_raw, rel=1e-9)


def test_without_a_reference_there_is_no_divergence(store: Path, raw: Path) -> None:
    options = RuntimeOptions(memory="60MiB")
    seen: list[EvaluationProgress] = []
    alone = evaluate(store, TEXTS[:1], options=options, window=WINDOW, max_tokens=2 * WINDOW, progress=seen.append)
    assert alone.windows == 2
    assert [(one.done, one.total) for one in seen] == [(1, 2), (2, 2)]
    assert seen[-1].perplexity == pytest.approx(alone.perplexity)
    assert evaluate(raw, TEXTS[:1], options=options, window=WINDOW).kl_to_raw == 0.0


def test_levels_come_closer_to_the_raw_model(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    options = PackOptions(calibration=False, dense_bits=16)
    store = pack(checkpoint, tmp_path / "store", options=options).path
    raw = pack_raw(checkpoint, tmp_path / "raw").path
    measured = [
        evaluate(store, TEXTS[:1], reference_path=raw, options=RuntimeOptions(memory="100MiB", level=level), window=64)
        for level in (2, 3, 4, 8)
    ]
    assert [one.level for one in measured] == [2, 3, 4, 8]
    distances = [one.kl_to_raw or 0 for one in measured]
    assert distances == sorted(distances, reverse=True)
    assert 0 < distances[-1] < distances[0] / 50
    bits = [one.bits_per_weight for one in measured]
    assert bits == [Subject.open(str(store)).bits_per_weight(level) for level in (2, 3, 4, 8)]
    by_itself = evaluate(store, TEXTS[:1], options=RuntimeOptions(memory="100MiB"), window=64)
    assert (by_itself.level, by_itself.kl_to_raw, by_itself.dense_bits) == (4, None, 16)
    assert by_itself.perplexity == measured[2].perplexity
    with pytest.raises(RequestError, match="does not hold raw weights"):
        evaluate(raw, TEXTS[:1], reference_path=store, window=64)
    with pytest.raises(RequestError, match="Level 5"):
        evaluate(store, TEXTS[:1], options=RuntimeOptions(level=5))


@pytest.mark.parametrize("window", [1, 1025, -3])
def test_windows_that_the_model_does_not_take(store: Path, window: int) -> None:
    with pytest.raises(RequestError, match=f"window is {window} tokens"):
        evaluate(store, TEXTS, window=window)


def test_a_reference_with_another_tokenizer_is_refused(store: Path, raw: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(locate_source(MODEL), tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(RequestError, match="makes other tokens"):
        _measure(store, pack_raw(other, tmp_path / "store").path)
