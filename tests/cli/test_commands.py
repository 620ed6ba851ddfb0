"""`pack`, `inspect`, `plan` and `demo` do their job on the built-in model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.running import MODEL, assert_user_error, run
from moestro.config import PackOptions

INSPECT_KEYS = {
    "kind",
    "path",
    "architecture",
    "model_type",
    "layers",
    "moe_layers",
    "experts",
    "active_experts",
    "dtypes",
    "levels",
    "encoding",
    "exact_level",
    "bits_per_weight",
    "dense_bits",
    "dense_bytes",
    "expert_bytes",
    "bytes_per_expert",
    "variants",
    "files",
    "problems",
}
"""Published: keys may be added here, never changed or taken away."""

PLAN_KEYS = {
    "model",
    "level",
    "memory_bytes",
    "floor_bytes",
    "missing_kv_bytes",
    "model_bytes",
    "dense_bytes",
    "lookup_on_disk",
    "spared_bytes",
    "expert_bytes",
    "kv_bytes",
    "activation_bytes",
    "staging_bytes",
    "arena_bytes",
    "whole_arena_bytes",
    "extent_bytes",
    "arena_experts",
    "total_experts",
    "least_arena_bytes",
    "least_bytes",
    "expected_bytes_per_token",
    "context",
    "max_sequences",
    "kv_blocks",
    "step_rows",
    "fits",
}
"""Published: keys may be added here, never changed or taken away."""


def test_pack_makes_a_store_and_finds_it_made(tmp_path: Path) -> None:
    for _ in range(2):
        result = run("pack", MODEL, tmp_path / "store", "--no-calibration", "--levels", "2,4", "--dense-bits", "16")
        assert result.exit_code == 0
        assert str(tmp_path / "store") in result.stdout
        assert "256 in 8 layers" in result.stdout
        for words in ("nested, exact at 4 bits", "4 bits", "mean relative squared error", "from the weights alone"):
            assert words in result.stdout
    assert run("inspect", tmp_path / "store", "--verify").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_pack_in_another_dtype(tmp_path: Path) -> None:
    assert run("pack", MODEL, tmp_path / "store", "--levels", "raw", "--dtype", "float32").exit_code == 0
    facts = json.loads(run("inspect", tmp_path / "store", "--json").stdout)
    assert facts["dtypes"] == ["F32"]
    assert facts["levels"] == [32]


def test_inspect_says_the_same_of_a_store_and_of_its_checkpoint(quantised: Path) -> None:
    packed = json.loads(run("inspect", quantised, "--json", "--verify").stdout)
    checkpoint = json.loads(run("inspect", MODEL, "--json").stdout)
    assert packed.keys() == checkpoint.keys() == INSPECT_KEYS
    assert (packed["kind"], checkpoint["kind"]) == ("store", "checkpoint")
    assert (packed["problems"], checkpoint["problems"]) == ([], None)
    assert packed["files"]["experts.planes"] == 256 * packed["bytes_per_expert"] == packed["expert_bytes"]
    assert (packed["levels"], packed["encoding"], packed["exact_level"]) == ([2, 3, 4, 8], "nested", 4)
    assert packed["experts"] == 32
    assert packed["active_experts"] == 4
    assert packed["moe_layers"] == 8
    own = ("kind", "path", "files", "problems")
    assert {k: v for k, v in packed.items() if k not in own} == {k: v for k, v in checkpoint.items() if k not in own}


def test_inspect_as_a_table(store: Path) -> None:
    result = run("inspect", store, "--verify")
    assert result.exit_code == 0
    for words in ("Qwen3MoeForCausalLM", "32 in each of 8 MoE layers, 4 active", "BF16", "experts.planes", "as packed"):
        assert words in result.stdout
    assert result.stderr == ""


def test_inspect_tells_how_good_a_store_is(quantised: Path) -> None:
    result = run("inspect", quantised)
    for words in ("nested, exact at 4", "2 bits", "mean relative squared error of an expert", "from the weights alone"):
        assert words in result.stdout


def test_only_a_store_can_be_verified() -> None:
    assert_user_error(run("inspect", MODEL, "--verify"), "moestro pack")


def test_plan_of_a_store_and_of_its_checkpoint(quantised: Path) -> None:
    plans = [json.loads(run("plan", model, "--memory", "40MiB", "--json").stdout) for model in (quantised, MODEL)]
    for plan in plans:
        assert plan.keys() == PLAN_KEYS
        assert plan["fits"]
        assert plan["least_bytes"] < plan["memory_bytes"] == 40 << 20
    own = ("model", "floor_bytes")
    assert {k: v for k, v in plans[0].items() if k not in own} == {k: v for k, v in plans[1].items() if k not in own}


def test_plan_needs_the_config_only(tmp_path: Path, store: Path) -> None:
    (tmp_path / "config.json").write_bytes((store / "config.json").read_bytes())
    result = run("plan", tmp_path, "--memory", "40MiB")
    assert result.exit_code == 0
    for words in ("expert arena", "dense weights", "KV cache", "least memory that works", "read per token"):
        assert words in result.stdout


def test_a_plan_that_does_not_fit_is_printed_as_json_too(store: Path) -> None:
    result = run("plan", store, "--memory", "1MiB", "--json")
    assert result.exit_code == 2
    plan = json.loads(result.stdout)
    assert not plan["fits"]
    assert str(plan["least_bytes"]) in result.stderr


def test_flags_without_effect_are_not_taken(store: Path) -> None:
    assert run("plan", store, "--policy", "lru").exit_code == 2
    assert run("inspect", store, "--memory", "1GB").exit_code == 2


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is not calibrated here, which would take a minute: `test_generate` has a smaller model packed so."""
    monkeypatch.setattr("moestro.store.locate.AUTOMATIC", PackOptions(calibration=False))
    result = run("demo", "--picture", tmp_path / "experts.png")
    assert result.exit_code == 0
    assert result.stdout.startswith("Mixture ")
    assert re.search(r"2[5-9]\.\d% of the experts", result.stdout)
    for words in ("memory given", "peak resident", "process floor", "tokens per second"):
        assert words in result.stdout
    for words in ("expert hits", "expert misses", "bytes read", "waiting for the disk"):
        assert words in result.stdout
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["experts.jpg", "no/such/folder/experts.png"])
def test_demo_checks_the_picture_first(name: str, tmp_path: Path) -> None:
    assert_user_error(run("demo", "--picture", tmp_path / name), "picture")
