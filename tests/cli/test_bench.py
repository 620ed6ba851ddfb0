"""`bench` measures what it says, on stores of any kind, and replays routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GptOssConfig

from cli.running import MODEL, assert_user_error, run
from families import FAMILIES
from moestro.trace import Trace

EXCERPT = Path(__file__).parents[1] / "data" / "gpt-oss-20b-excerpt.npz"

KEYS = {
    "model",
    "prompt_tokens",
    "gen_tokens",
    "repeat",
    "warmup",
    "concurrency",
    "text",
    "cold",
    "replay_routing",
    "seed",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "roofline_decode_tokens_per_s",
    "roofline_prefill_tokens_per_s",
    "decode",
    "prefill",
    "machine",
    "threads",
    "load_s",
    "dense_bytes_per_step",
    "hits",
    "misses",
    "bytes_read",
    "stall_s",
    "peak_rss_bytes",
    "process_floor_bytes",
    "memory_bytes",
    "level",
    "path",
    "policy",
    "direct_io",
}
"""Published: keys may be added, never changed or taken away."""

SMALL = ("--prompt-tokens", "12", "--gen-tokens", "6", "--repeat", "2")


def _bench(model: str | Path, *arguments: str | Path) -> dict[str, Any]:
    result = run("bench", model, "--json", *SMALL, *arguments)
    assert result.exit_code == 0, result.stderr
    whole: dict[str, Any] = json.loads(result.stdout)
    return whole


def _gpt_oss(folder: Path) -> Path:
    """A store of the published shape in little: 24 layers, 4 of 32 experts."""
    GptOssConfig(
        num_hidden_layers=24,
        num_local_experts=32,
        num_experts_per_tok=4,
        hidden_size=64,
        intermediate_size=64,
        vocab_size=4096,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ).save_pretrained(folder / "config")
    packed = run("pack", "--random", folder / "config" / "config.json", folder / "store", "--levels", "2,4")
    assert packed.exit_code == 0
    assert "random weights of seed 0" in packed.stdout
    assert "There is no tokenizer beside" in packed.stderr
    return folder / "store"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _gpt_oss(tmp_path_factory.mktemp("bench"))


def test_as_json(quantised: Path) -> None:
    found = _bench(quantised, "--memory", "24MiB")
    assert found.keys() >= KEYS
    for phase in ("decode", "prefill"):
        rate, detail = found[f"{phase}_tokens_per_s"], found[phase]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert found[f"roofline_{phase}_tokens_per_s"] == detail["roofline_tokens_per_s"] > rate["min"]
        assert detail["bound"]["by"] in ("disk", "memory", "compute")
        assert detail["misses"] > 0
        assert detail["bytes_read"] > 0
        assert 0 <= detail["stall_share"] < 1
    assert found["decode"]["tokens"] == 12
    assert found["prefill"]["tokens"] == 24
    # 4 of 32 experts in 8 layers, for each of 12 tokens.
    assert found["decode"]["hits"] + found["decode"]["misses"] == 12 * 4 * 8
    # The floor counts up to 24 MiB of library pages that may not have come back yet.
    assert found["peak_rss_bytes"] > found["process_floor_bytes"] - (24 << 20)
    dense, expert = found["dense_bytes_per_step"], found["expert_bytes"] / 256
    bytes_without_kv = dense + 32 * expert
    assert bytes_without_kv < found["decode"]["memory_bytes_per_token"] < bytes_without_kv * 1.2


def test_several_requests_share_the_dense_weights(quantised: Path) -> None:
    one, three = (_bench(quantised, "--memory", "64MiB", "--concurrency", str(count)) for count in (1, 3))
    assert three["decode"]["tokens"] == 3 * one["decode"]["tokens"]
    assert three["prefill"]["tokens"] == 3 * one["prefill"]["tokens"]
    assert three["decode"]["memory_bytes_per_token"] < one["decode"]["memory_bytes_per_token"]
    assert one["misses"] <= 256  # all experts stay where they are read to


def test_as_a_table_on_real_text(quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The bridge over the river was built of stone. " * 20)
    result = run("bench", quantised, *SMALL, "--memory", "40MiB", "--text", tmp_path / "text.txt", "--cold")
    assert result.exit_code == 0, result.stderr
    for words in ("decode", "prefill", "at best", "GB/s", "GMAC/s", "experts in memory", "peak resident", "cold"):
        assert words in result.stdout
    assert "measuring: 2 of 2 runs" in result.stderr


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_random_stores_of_other_families(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "config")
    levels = ("--levels", "raw") if family == "olmoe" else ("--levels", "2,4")
    assert run("pack", "--random", tmp_path / "config", tmp_path / "store", *levels).exit_code == 0
    found = _bench(tmp_path / "store", "--memory", "64MiB")
    assert found["path"] == ("general" if family == "deepseek_v3" else "native")
    assert found["machine"]["multiplications_per_s"] > 0


def test_replayed_routing(gpt_oss: Path, tmp_path: Path) -> None:
    """All requests on one expert after another: nothing but those is read, and the cache serves nearly all."""
    trace = Trace.load(EXCERPT, num_experts=32)
    found = _bench(gpt_oss, "--memory", "64MiB", "--replay-routing", EXCERPT)
    assert found["decode"]["hits"] + found["decode"]["misses"] == 12 * 4 * 24
    narrow = Trace(
        experts_NLK=np.tile(np.arange(4, dtype=np.uint8), (8, 24, 1)),
        weights_NLK=np.full((8, 24, 4), 63, dtype=np.uint8),
        token_N=np.zeros(8, dtype=np.int32),
        offsets_R1=np.array([0, 8], dtype=np.int64),
        meta=({},),
        num_experts=32,
        decode_N=np.ones(8, dtype=bool),
    )
    narrow.save(tmp_path / "narrow.npz")
    same = _bench(gpt_oss, "--memory", "64MiB", "--warmup", "0", "--replay-routing", tmp_path / "narrow.npz")
    assert same["misses"] == 4 * 24
    assert trace.layers == 24


def test_routing_of_another_shape_is_refused(quantised: Path, gpt_oss: Path, tmp_path: Path) -> None:
    result = run("bench", quantised, *SMALL, "--replay-routing", EXCERPT)
    assert result.exit_code == 2
    assert "is of 24 MoE layers with 4 of 32 experts for a token; this model has 8 with 4 of 32" in result.stderr
    result = run("bench", gpt_oss, *SMALL, "--replay-routing", tmp_path / "nothing.npz")
    assert result.exit_code == 2
    assert "nothing.npz cannot be read" in result.stderr


def test_nobody_else_replays(gpt_oss: Path) -> None:
    for command in ("generate", "eval", "demo"):
        result = run(command, gpt_oss, "--replay-routing", EXCERPT)
        assert result.exit_code == 2
        assert "No such option" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--gen-tokens", "0"), "gen_tokens is 0"),
        (("--repeat", "0"), "repeat is 0"),
        (("--concurrency", "-1"), "concurrency is -1"),
        (("--context", "8"), "needs a context of"),
        (("--memory", "1MiB"), "too little for this model"),
        (("--text", __file__, "--prompt-tokens", "900000"), "context"),
    ],
)
def test_what_cannot_be_measured_is_named(arguments: tuple[str, ...], word: str, quantised: Path) -> None:
    result = run("bench", quantised, *SMALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert word in result.stderr


def test_a_text_that_is_too_short(quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Word")
    assert_user_error(run("bench", quantised, *SMALL, "--text", tmp_path / "short.txt"), "short.txt", "at least")


def test_flags_of_random_weights(tmp_path: Path) -> None:
    assert_user_error(run("pack", MODEL, tmp_path / "store", "--seed", "3"), "--seed is for --random")
    FAMILIES["olmoe"]().save_pretrained(tmp_path / "config")
    result = run("pack", "--random", tmp_path / "config", tmp_path / "store", "--calibrate", "text.txt")
    assert_user_error(result, "nothing to calibrate")
