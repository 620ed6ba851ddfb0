"""Which type a tensor is stored in, and casts that would lose its values."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES
from moestro.errors import CheckpointError
from moestro.hf.skeleton import build_skeleton
from moestro.store.casting import CastOverflowError, cast_into, common_dtype, dense_dtype, fp32_names, parse_dtype


def test_options() -> None:
    assert [parse_dtype(name) for name in ("bfloat16", "float16", "float32", "BF16")] == ["BF16", "F16", "F32", "BF16"]
    with pytest.raises(CheckpointError, match="dtype 'int8' is unknown"):
        parse_dtype("int8")


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [(["BF16"], "BF16"), (["F16", "F16"], "F16"), (["BF16", "F16"], "F32"), (["F64"], "F32"), (["BF16", "F32"], "F32")],
)
def test_the_common_type_holds_all(dtypes: list[str], common: str) -> None:
    assert common_dtype(dtypes) == common


@pytest.mark.parametrize(
    ("shape", "source", "target", "forced", "keep", "stored"),
    [
        ((4,), "BF16", "BF16", False, False, "F32"),
        ((), "F16", "F16", False, False, "F32"),
        ((4, 4), "BF16", "BF16", False, False, "BF16"),
        ((4, 4), "F32", "BF16", False, False, "F32"),
        ((4, 4), "F32", "BF16", True, False, "BF16"),
        ((4, 4), "BF16", "F16", False, False, "F32"),
        ((4, 4), "BF16", "F32", False, False, "F32"),
        ((4, 4), "BF16", "BF16", True, True, "F32"),
        ((4, 4), "I64", "BF16", True, True, "I64"),
    ],
)
def test_stored_types(shape: tuple[int, ...], source: str, target: str, forced: bool, keep: bool, stored: str) -> None:
    assert dense_dtype(shape, source, target, forced=forced, keep_fp32=keep) == stored


def test_what_transformers_keeps_in_fp32_is_kept() -> None:
    names = fp32_names(build_skeleton(FAMILIES["ernie4_5_moe"]()), "BF16")
    assert "model.layers.1.mlp.gate.weight" in names
    assert "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias" in names
    assert "model.layers.1.self_attn.q_proj.weight" not in names
    assert fp32_names(build_skeleton(FAMILIES["mixtral"]()), "BF16") == frozenset()


def test_an_overflow_names_the_tensor() -> None:
    values = torch.tensor([1.0, -70000.0, 80000.0])
    with pytest.raises(CastOverflowError, match="Tensor w has values up to 80000, more than F16 can hold"):
        cast_into(torch.empty(3, dtype=torch.float16), values, "w")
    with pytest.raises(CastOverflowError, match="more than BF16 can hold"):
        cast_into(torch.empty(1, dtype=torch.bfloat16), torch.tensor([3.4e38]), "w")


def test_infinities_and_nan_stay() -> None:
    stored = torch.empty(3, dtype=torch.float16)
    cast_into(stored, torch.tensor([float("inf"), float("nan"), -float("inf")]), "w")
    assert stored[0] == float("inf")
    assert stored[1].isnan()
    assert stored[2] == -float("inf")
