"""Packing quantised stores without a calibration text."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from families import FAMILIES, save_checkpoint
from moestro.config import PackOptions
from moestro.errors import CheckpointError, StoreError
from moestro.hf.linears import head_names, linear_names
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.quant.flat import flat_decode
from moestro.store.dense_file import FLAT_BITS
from moestro.store.pack import PackProgress, pack
from moestro.store.pack_plan import expert_layouts, planned_dense_bytes
from store.crash import LIMITS, pack_counting, pack_until, run
from store.reading import read_level

OPTIONS = PackOptions(calibration=False)
SIGNS = PackOptions(encoding="signs", levels="2,4", exact_level=2, dense_bits=4, calibration=False)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A checkpoint in `source` of the test's folder."""
    return save_checkpoint("olmoe", tmp_path / "source")


def _error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted - found).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("options", [OPTIONS, SIGNS], ids=["nested", "signs"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_its_weights_back_nearly(family: str, options: PackOptions, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path / "source")
    store = pack(tmp_path / "source", tmp_path / "store", options=options)
    assert store.verify() == []
    manifest = store.manifest
    assert (manifest.encoding, manifest.levels, manifest.exact_level, manifest.dense_bits) == (
        options.encoding,
        options.promised_levels,
        options.exact_level,
        options.dense_bits,
    )
    state = model.state_dict()
    facts = manifest.calibration
    assert facts is not None
    assert (facts.text, facts.tokens, facts.sensitivity, facts.unrouted) == (None, 0, None, ())
    layer = store.layers[-1]
    transposed = family == "gpt_oss"
    for index, level in enumerate(manifest.levels):
        total = 0.0
        for name, found in read_level(store, layer.layer, 5, level).items():
            wanted = state[f"{layer.module}.{name}"][5]
            if found.ndim == 1:
                assert torch.equal(found, wanted)
                continue
            error = _error(wanted.t() if transposed else wanted, found)
            assert error < {2: 0.25, 3: 0.08, 4: 0.025, 8: 2e-4}[level]
            total += error
        assert facts.errors[layer.layer][5][index] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_dense_weights_of_linear_maps(family: str, bits: int, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path / "source")
    options = replace(OPTIONS, dense_bits=bits)
    store = pack(tmp_path / "source", tmp_path / "store", options=options)
    skeleton = build_skeleton(load_config(tmp_path / "source"))
    assert store.dense_file.stat().st_size == planned_dense_bytes(skeleton, "F32", options)
    assert expert_layouts(skeleton, "F32", options) == tuple(layer.layout for layer in store.layers)
    linears = linear_names(skeleton)
    data = torch.frombuffer(bytearray(store.dense_file.read_bytes()), dtype=torch.uint8)
    assert linears
    for name, tensor in store.dense.items():
        stored = data[tensor.offset : tensor.offset + tensor.nbytes]
        wanted = model.state_dict()[name]
        if bits == 16 or name not in linears:
            assert torch.equal(stored.view(wanted.dtype).view(wanted.shape), wanted), name
        else:
            own_bits = 8 if name in head_names(skeleton) else bits
            assert FLAT_BITS[tensor.dtype] == own_bits
            found = flat_decode(stored, *tensor.shape, own_bits)
            assert _error(wanted, found) < {4: 0.02, 8: 1e-4}[own_bits], name


def test_other_options_are_another_store(model: PreTrainedModel, tmp_path: Path) -> None:
    store = pack(tmp_path / "source", tmp_path / "store", options=OPTIONS)
    assert pack(tmp_path / "source", tmp_path / "store", options=OPTIONS) == store
    others = [
        replace(OPTIONS, dense_bits=16),
        replace(OPTIONS, encoding="signs"),
        replace(OPTIONS, levels="2,3,4"),
        replace(OPTIONS, exact_level=8),
        PackOptions(levels="raw"),
    ]
    for other in others:
        with pytest.raises(StoreError, match=r"of another checkpoint or packed otherwise .* asked for source"):
            pack(tmp_path / "source", tmp_path / "store", options=other)
    store.path.rename(tmp_path / "store.partial")
    for other in others:
        with pytest.raises(StoreError, match="unfinished store of another source, with other options"):
            pack(tmp_path / "source", tmp_path / "store", options=other)


def test_progress_counts_every_byte(model: PreTrainedModel, tmp_path: Path) -> None:
    reports: list[PackProgress] = []
    store = pack(tmp_path / "source", tmp_path / "store", options=OPTIONS, progress=reports.append)
    assert reports[0].done_bytes == 0
    assert reports[-1].done_bytes == reports[-1].total_bytes == store.expert_bytes + store.dense_bytes
    assert reports[-1].stage == "experts of layer 3 of 3"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", r"model\.layers\.1\.mlp\.experts\.gate_up_proj of expert 3"),
        ("model.layers.1.self_attn.q_proj.weight", r"model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("model.norm.weight", r"model\.norm\.weight"),
    ],
)
def test_what_is_not_a_number_is_refused_by_name(
    key: str, name: str, value: float, model: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors[key].view(-1)[5] = value
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"Tensor {name} holds 1 value\(s\) that are NaN or infinite"):
        pack(tmp_path / "source", tmp_path / "store", options=OPTIONS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("options", [OPTIONS, SIGNS], ids=["nested", "signs"])
def test_weights_of_one_value_come_back_exactly(options: PackOptions, model: PreTrainedModel, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for key, tensor in tensors.items():
        if "layers.0.mlp.experts.1." in key:
            tensor.zero_()
        if "layers.0.mlp.experts.2." in key:
            tensor.fill_(0.375)
        if "layers.0.self_attn.q_proj" in key:
            tensor.zero_()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    store = pack(tmp_path / "source", tmp_path / "store", options=options)
    facts = store.manifest.calibration
    assert facts is not None
    for expert, value in ((1, 0.0), (2, 0.375)):
        for level in options.promised_levels:
            for found in read_level(store, 0, expert, level).values():
                torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-3, atol=0)
        assert max(facts.errors[0][expert]) < 1e-6


@pytest.mark.parametrize("point", range(3))
def test_a_killed_pack_ends_with_the_same_bytes(point: int, model: PreTrainedModel, tmp_path: Path) -> None:
    source, whole, report = tmp_path / "source", tmp_path / "whole", tmp_path / "calls"
    assert run(pack_counting, source, whole, report, OPTIONS) == 0
    calls = int(report.read_text())
    fatal_call = random.Random(point).randint(calls // 2, calls)
    assert run(pack_until, source, tmp_path / "store", fatal_call, OPTIONS) == -signal.SIGKILL
    store = pack(source, tmp_path / "store", options=OPTIONS, limits=LIMITS)
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
