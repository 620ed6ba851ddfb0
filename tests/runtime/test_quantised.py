"""Quantised stores, at each of their levels: what they compute, and that nothing but the level changes a bit of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from decoding import decoded_model
from families import FAMILIES, random_model
from moestro.config import PackOptions
from moestro.errors import PlaneReadError, RequestError
from moestro.kernels import KERNELS
from moestro.kernels.base import MatrixSpec
from moestro.kernels.reference import ReferenceKernels
from moestro.runtime.dense import PackedWeight
from moestro.store.pack import pack
from moestro.store.reader import Store
from opening import Feed, logits_of, open_store

NESTED = PackOptions(calibration=False)
SIGNS = PackOptions(calibration=False, encoding="signs", levels="2,4", exact_level=2, dense_bits=4)
PROMPT = [5, 17, 3, 99, 42, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23, 58, 101, 6, 44, 71]
SHORT = [9, 4, 77]
LONG = [(7 * index * index + 3 * index + 11) % 157 + 3 for index in range(90)]


def _pack(family: str, folder: Path, options: PackOptions) -> Path:
    random_model(FAMILIES[family](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=options).path


class FloatActivations(ReferenceKernels):
    """Computes with the values that quantised matrices stand for, and with activations as they are."""

    def packed_linear(
        self,
        x_TK: torch.Tensor,
        matrix: MatrixSpec,
        planes: Sequence[int],
        level: int,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.linear(x_TK, self.unpack(matrix, planes, level), bias_N)


def _assert_float_model(folder: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(folder)
    with torch.inference_mode():
        expected = decoded_model(store, level or store.manifest.exact_level)(torch.tensor([PROMPT])).logits[0]
    with open_store(folder, share=0.3, level=level) as opened:
        rounded = logits_of(opened, PROMPT)
    monkeypatch.setitem(KERNELS, "auto", lambda _threads: FloatActivations())
    with open_store(folder, share=0.3, level=level, native=False) as opened:
        actual = logits_of(opened, PROMPT)
    monkeypatch.undo()
    assert (actual - expected).abs().max() <= 1e-3
    # Rounding may send a row of a random model to other experts, and later rows attend to it: not every row is near.
    errors_T = (rounded - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors_T.min() <= 0.03
    assert errors_T.median() <= 0.15
    assert expected.std() > 0.1, "the logits say nothing"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_a_float_model_of_the_decoded_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the rounding of activations; without it, they are the same. No dense matrix is unpacked on the way."""
    folder = _pack(family, tmp_path, NESTED)
    monkeypatch.setattr(PackedWeight, "unpacked", None)
    _assert_float_model(folder, 0, monkeypatch)


@pytest.fixture(scope="module", params=["gpt_oss-nested", "qwen3_moe-nested", "mixtral-signs"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases and interleaved gates; with a tied embedding; with a scale per plane and dense weights of 4 bits."""
    family, encoding = request.param.split("-")
    return _pack(family, tmp_path_factory.mktemp(request.param), NESTED if encoding == "nested" else SIGNS)


def _levels(store: Path) -> tuple[int, ...]:
    return Store.open(store).manifest.levels


def test_every_level_is_that_of_its_own_decoded_weights(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in _levels(store):
        _assert_float_model(store, level, monkeypatch)


def test_nothing_but_the_level_changes_a_bit(store: Path) -> None:
    """Not the memory, the cache's state, the chunks, the threads or the neighbours."""
    seen = []
    for level in _levels(store):
        with open_store(store, share=1.0, threads=1, level=level) as opened:
            long, short = logits_of(opened, LONG), logits_of(opened, SHORT)
            assert torch.equal(logits_of(opened, LONG), long)
            assert opened.runner.planes.stats.hits > 0
        seen.append(long)
        with open_store(store, share=0.0, threads=2, level=level, max_sequences=4) as opened:
            assert torch.equal(logits_of(opened, LONG, chunk=13), long)
            assert torch.equal(logits_of(opened, SHORT, chunk=1), short)
            assert opened.runner.planes.stats.misses > 0
        with open_store(store, share=0.4, threads=2, level=level, max_sequences=4) as opened:
            cold = logits_of(opened, LONG)
            feed = Feed(opened)
            first = feed.step({0: LONG[::-1], 1: LONG[:50], 2: SHORT[:2]})
            second = feed.step({2: SHORT[2:], 1: LONG[50:], 0: LONG[:3]})
        assert torch.equal(cold, long)
        assert torch.equal(torch.cat([first[1], second[1]]), long)
        assert torch.equal(torch.cat([first[2], second[2]]), short)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(seen))


def test_only_the_planes_up_to_the_level_are_read_and_planned(store: Path) -> None:
    manifest = Store.open(store).manifest
    for level in manifest.levels:
        planes = [plane for plane in manifest.layouts[0].planes if plane.level <= level]
        with open_store(store, share=1.0, level=level) as opened:
            logits_of(opened, LONG)
            stats = opened.runner.planes.stats
            resident = opened.runner.planes.resident()
            assert opened.plan.level == level
            per_expert = opened.plan.expert_bytes // opened.plan.total_experts
        assert per_expert == sum(plane.nbytes for plane in planes)
        assert stats.bytes_read == stats.misses * per_expert
        assert {key[2] for key in resident} == set(range(len(planes)))


def test_level_zero_is_the_exact_one(store: Path) -> None:
    exact = Store.open(store).manifest.exact_level
    with open_store(store, level=exact) as named, open_store(store) as default:
        assert default.plan.level == exact
        assert torch.equal(logits_of(named, SHORT), logits_of(default, SHORT))


def test_a_level_that_the_store_does_not_promise_is_refused(store: Path) -> None:
    levels = ", ".join(map(str, _levels(store)))
    with pytest.raises(RequestError, match=rf"Level 7 .* levels {levels} .*exact"):
        open_store(store, level=7)


def test_damage_in_the_middle_of_a_chain_is_named(store: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    opened_store = Store.open(damaged)
    for expert in range(opened_store.layers[1].num_experts):
        extent = opened_store.plane((1, expert, 1))
        with extent.file.open("r+b") as file:
            file.seek(extent.offset + 64)
            byte = file.read(1)[0]
            file.seek(extent.offset + 64)
            file.write(bytes([byte ^ 1]))
    with (
        open_store(damaged, share=0.5, level=4) as opened,
        pytest.raises(PlaneReadError, match=r"of expert \d of MoE layer 1 .*the checksum of plane 1 is") as failure,
    ):
        Feed(opened).step({7: SHORT})
    assert failure.value.requests == {7}
    with open_store(damaged, share=0.5, level=2) as opened:
        logits_of(opened, SHORT)  # does not need that plane
