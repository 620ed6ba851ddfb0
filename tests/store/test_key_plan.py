"""Which of a checkpoint's tensors make which of the model's, and what cannot be mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES, random_model, save_checkpoint
from moestro.errors import CheckpointError, UnsupportedModelError
from moestro.hf.bridge import Concatenate, MergeModulelist, Transpose, WeightConverter
from moestro.hf.skeleton import build_skeleton
from moestro.store.checkpoint import Checkpoint
from moestro.store.conversion import check_expertwise, natural
from moestro.store.key_plan import plan_keys
from packing import pack_raw
from store.reading import assert_holds, read_dense, read_expert


def _edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None remove) tensors of a checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def test_twelve_experts_keep_their_numbers(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    config.num_local_experts = 12
    model = random_model(config)
    model.save_pretrained(tmp_path / "source")
    assert_holds(pack_raw(tmp_path / "source", tmp_path / "store"), model.state_dict())


def test_keys_sort_naturally() -> None:
    keys = ["a.10.w", "a.9.w", "a.9.b", "a.w", "a.9.10", "a.9.9"]
    assert sorted(keys, key=natural) == ["a.9.9", "a.9.10", "a.9.b", "a.9.w", "a.10.w", "a.w"]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path)
    _edit(
        tmp_path,
        **{"model.layers.1.mlp.experts.4.up_proj.weight": None, "model.layers.2.self_attn.q_norm.weight": None},
    )
    with pytest.raises(CheckpointError, match=r"lacks 2 tensor\(s\)") as caught:
        pack_raw(tmp_path, tmp_path / "store")
    assert "model.layers.1.mlp.experts.4 (mlp.experts.*.up_proj.weight)" in str(caught.value)
    assert "model.layers.2.self_attn.q_norm.weight" in str(caught.value)
    assert not (tmp_path / "store.partial").exists()


def test_a_whole_missing_layer_is_named(tmp_path: Path) -> None:
    save_checkpoint("gpt_oss", tmp_path)
    _edit(tmp_path, **{"model.layers.3.mlp.experts.down_proj_bias": None})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\).*model\.layers\.3\.mlp\.experts\.down_proj_bias"):
        pack_raw(tmp_path, tmp_path / "store")


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.7.up_proj.weight", (16, 64)),
        ("qwen3_moe", "model.layers.1.mlp.experts.0.down_proj.weight", (64, 16)),
        ("qwen3_moe", "model.layers.1.self_attn.q_proj.weight", (64, 64)),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (8, 128, 64)),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (7, 64, 128)),
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (9, 64, 64)),
    ],
)
def test_another_shape_is_named(family: str, key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    save_checkpoint(family, tmp_path)
    _edit(tmp_path, **{key: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"has shape .*, expected"):
        pack_raw(tmp_path, tmp_path / "store")


def test_halves_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path)
    _edit(tmp_path, **{"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(32, 63)})
    with pytest.raises(CheckpointError, match=r"cannot be converted|has shape"):
        pack_raw(tmp_path, tmp_path / "store")


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path)
    _edit(tmp_path, **{"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)})
    with pytest.raises(CheckpointError, match=r"experts\.8\.up_proj\.weight, but the config says .* has 8 experts"):
        pack_raw(tmp_path, tmp_path / "store")


def test_two_tensors_for_one_are_refused(tmp_path: Path) -> None:
    save_checkpoint("granitemoe", tmp_path)
    _edit(tmp_path, **{"model.layers.0.block_sparse_moe.experts.down_proj": torch.zeros(8, 64, 32)})
    with pytest.raises(CheckpointError, match=r"both stand for model\.layers\.0\.block_sparse_moe\.experts\.down_proj"):
        pack_raw(tmp_path, tmp_path / "store")


def test_what_the_model_does_not_use_is_listed(tmp_path: Path) -> None:
    model = save_checkpoint("deepseek_v3", tmp_path)
    extra = {f"model.layers.3.mlp.experts.{i}.up_proj.weight": torch.zeros(2, 2) for i in range(12)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    _edit(tmp_path, **extra)
    store = pack_raw(tmp_path, tmp_path / "store")
    assert store.manifest.source.ignored == (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.3.mlp.experts.*.up_proj.weight",
    )
    assert_holds(store, model.state_dict())


def test_a_tied_head_in_the_checkpoint_is_ignored(tmp_path: Path) -> None:
    model = save_checkpoint("qwen3_moe", tmp_path)
    _edit(tmp_path, **{"lm_head.weight": torch.zeros(160, 64)})
    store = pack_raw(tmp_path, tmp_path / "store")
    assert store.manifest.source.ignored == ("lm_head.weight",)
    assert_holds(store, model.state_dict(), frozenset({"lm_head.weight"}))


def test_tied_weights_stored_under_the_other_name_are_found(tmp_path: Path) -> None:
    model = save_checkpoint("qwen3_moe", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _edit(tmp_path, **{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    store = pack_raw(tmp_path, tmp_path / "store")
    assert store.manifest.source.ignored == ()
    assert_holds(store, model.state_dict(), frozenset({"lm_head.weight"}))


def test_a_checkpoint_of_the_base_model_is_found(tmp_path: Path) -> None:
    """Keys without the prefix `model.`, as a headless model saves them."""
    model = save_checkpoint("qwen3_moe", tmp_path)
    tensors = {name.removeprefix("model."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(pack_raw(tmp_path, tmp_path / "store"), model.state_dict(), frozenset({"lm_head.weight"}))


def test_experts_that_are_fused_already_are_sliced(tmp_path: Path) -> None:
    """transformers' own layout, as saving a state dict by hand gives it, for a family that saves single experts."""
    model = save_checkpoint("mixtral", tmp_path)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_holds(pack_raw(tmp_path, tmp_path / "store"), model.state_dict())


def test_a_wide_dense_matrix_keeps_its_bits_unless_asked(tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16)
    router = torch.randn(8, 64)
    _edit(tmp_path / "source", **{"model.layers.1.mlp.gate.weight": router})
    kept = pack_raw(tmp_path / "source", tmp_path / "kept")
    assert kept.manifest.dtype == "BF16"
    assert torch.equal(read_dense(kept)["model.layers.1.mlp.gate.weight"], router)
    cast = pack_raw(tmp_path / "source", tmp_path / "cast", dtype="bfloat16")
    assert torch.equal(read_dense(cast)["model.layers.1.mlp.gate.weight"], router.bfloat16())


def test_experts_of_mixed_types_are_widened(tmp_path: Path) -> None:
    save_checkpoint("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16)
    wide = torch.randn(32, 64)
    _edit(tmp_path / "source", **{"model.layers.2.mlp.experts.5.up_proj.weight": wide})
    store = pack_raw(tmp_path / "source", tmp_path / "store")
    assert store.manifest.dtype == "F32"
    assert torch.equal(read_expert(store, 2, 5)["gate_up_proj"][32:], wide)


_MERGE, _CAT = MergeModulelist(dim=0), Concatenate(dim=1)


@pytest.mark.parametrize(
    ("source", "operations"),
    [
        ("e.*.w", [_MERGE, _CAT]),
        ("e.*.w", [_MERGE, Transpose(1, 2)]),
        ("e.w", [Transpose(2, 1)]),
        ("e.w", [_CAT]),
    ],
)
def test_operations_on_single_experts(source: str, operations: list[Any]) -> None:
    check_expertwise(WeightConverter([source], ["e"], operations), "e")


@pytest.mark.parametrize(
    ("source", "operations", "named"),
    [
        ("e.*.w", [_MERGE, Concatenate(dim=0)], r"Concatenate\(dim=0\)"),
        ("e.*.w", [_CAT], "Concatenate"),
        ("e.*.w", [MergeModulelist(dim=1)], "MergeModulelist"),
        ("e.w", [_MERGE], "MergeModulelist"),
        ("e.w", [Transpose(0, 1)], "Transpose"),
        ("e.w", [Transpose(1, 2, check_dims=True)], "Transpose"),
    ],
)
def test_operations_across_experts_are_refused(source: str, operations: list[Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Packing e needs the conversion {named}"):
        check_expertwise(WeightConverter([source], ["e"], operations), "e")


def test_a_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("deepseek_v3", tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        reads: list[str] = []
        monkeypatch.setattr("os.preadv", lambda *_: reads.append("read"))
        plan = plan_keys(build_skeleton(FAMILIES["deepseek_v3"]()), checkpoint.tensors)
    assert len(plan.experts) == 2
    assert [source.param.name for source in plan.experts[0]] == ["gate_up_proj", "down_proj"]
    assert reads == []
