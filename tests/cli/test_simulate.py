"""`moestro simulate` and `moestro trace fit`: what they print, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.running import assert_user_error, run, run_process
from moestro.foresight import NETS_FILE, load_nets
from moestro.policy.observation import Shape
from traces import EXCERPT, random_trace

KEYS = {
    *("slots", "accesses", "hit_rate", "lru_hit_rate", "belady_hit_rate", "gap_closed", "prefetch_recall"),
    *("prefetch_precision", "tokens", "bytes", "stall_seconds", "time_per_token_s", "lru_bytes"),
    *("lru_time_per_token_s", "memory", "page_cache_bytes", "page_cache_time_per_token_s"),
}
"""Published: keys may be added here, never changed or taken away."""


def test_real_routing_is_replayed() -> None:
    result = run_process("simulate", EXCERPT, "--slots", "8", "--policy", "lrfu", "--predictor", "recency", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told) == KEYS
    assert told["slots"] == 8
    assert told["lru_hit_rate"] < told["hit_rate"] < told["belady_hit_rate"] < 1
    assert 0 < told["time_per_token_s"] < told["lru_time_per_token_s"] < told["page_cache_time_per_token_s"]
    assert set(told["bytes"]) == {"demand", "prefetch", "wasted"}
    assert told["bytes"]["demand"] < told["lru_bytes"]["demand"]


def test_for_people_it_says_the_same() -> None:
    result = run("simulate", EXCERPT, EXCERPT, "--memory", "3GB", "--policy", "lru", "--prefetch", "off")
    assert result.exit_code == 0, result.stderr
    assert "hits of" in result.stdout
    assert "0.0% of the way from LRU to Belady" in result.stdout
    assert "recall" not in result.stdout


def test_a_sweep_over_memory(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    flags = ("--policy", "lrfu", "--predictor", "recency", "--timed-tokens", "60")
    result = run("simulate", EXCERPT, "--slots", "4, 8,16", *flags, "--json", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    sizes = json.loads(result.stdout)["sizes"]
    assert [one["slots"] for one in sizes] == [4, 8, 16]
    assert all(set(one) == KEYS for one in sizes)
    for key in ("hit_rate", "lru_hit_rate", "belady_hit_rate", "memory"):
        assert sizes[0][key] < sizes[1][key] < sizes[2][key]
    for key in ("time_per_token_s", "lru_time_per_token_s", "page_cache_time_per_token_s"):
        assert sizes[0][key] > sizes[1][key] > sizes[2][key]
    assert 0 < sizes[0]["tokens"] < 120
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone = run("simulate", EXCERPT, "--memory", str(sizes[1]["memory"]), *flags, "--json")
    assert json.loads(alone.stdout) == sizes[1]
    drawn = run("simulate", EXCERPT, "--memory", "2GB,3GB", *flags)
    assert "by experts of each layer" in drawn.stdout
    assert "time per token of lrfu with recency prefetch" in drawn.stdout


def test_gates_are_asked_where_they_were_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    random_trace(0, prompts=(4, 4), answers=(20, 20), layers=4, experts=16, picks=2, ahead=2).save(trace)
    flags = ("--slots", "4", "--predictor", "gate", "--json")
    for policy in ("lru", "value"):
        result = run("simulate", trace, *flags, "--policy", policy)
        assert result.exit_code == 0, result.stderr
        assert set(json.loads(result.stdout)) == KEYS


def test_slower_links_take_longer() -> None:
    def seconds(*flags: str) -> float:
        result = run("simulate", EXCERPT, "--slots", "8", "--policy", "lru", "--prefetch", "off", "--json", *flags)
        assert result.exit_code == 0, result.stderr
        return float(json.loads(result.stdout)["time_per_token_s"])

    plain = seconds("--fit", "none")
    assert seconds("--fit", "none", "--disk-bw", "1GB") > plain
    assert seconds("--fit", "none", "--link-bw", "1GB") > plain
    assert seconds("--fit", "none", "--compute", "0.01") > plain
    assert seconds("--fit", "none", "--model-shape", "2880x2880x2") < plain
    assert seconds("--fit", "none", "--concurrency", "4") != plain


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "either --slots (experts of each layer) or --memory"),
        (["--slots", "8", "--memory", "1GB"], "either --slots (experts of each layer) or --memory"),
        (["--slots", "2"], "a token needs 4"),
        (["--slots", "-1"], "slots is '-1'"),
        (["--slots", "8,,16"], "slots is '8,,16'"),
        (["--slots", "8,2"], "a token needs 4"),
        (["--slots", "8", "--timed-tokens", "-1"], "timed_tokens is -1"),
        (["--slots", "8", "--predictor", "gate"], "has no lookahead"),
        (["--slots", "8", "--plot", "sweep.svg"], "no .png file"),
        (["--slots", "8", "--policy", "fifo"], "'fifo'"),
        (["--slots", "8", "--predictor", "tarot"], "'tarot'"),
        (["--slots", "8", "--policy", "auto"], "'auto'"),
        (["--slots", "8", "--prefetch", "maybe"], "prefetch is 'maybe'"),
        (["--slots", "8", "--fit", "all"], "fit is 'all'"),
        (["--slots", "8", "--fit", "none"], "needs requests to learn from"),
        (["--slots", "8", "--model-shape", "big"], "model_shape is 'big'"),
        (["--slots", "8", "--concurrency", "0"], "concurrency is 0"),
        (["--slots", "8", "--disk-bw", "fast"], "'fast' is not a size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags: list[str], named: str) -> None:
    assert_user_error(run("simulate", EXCERPT, *flags), named)


def test_a_trace_of_another_model_than_the_store_is_refused(store: Path) -> None:
    assert_user_error(run("simulate", EXCERPT, "--slots", "8", "--store", store), "24 MoE layers of 32 experts")
    assert_user_error(run("trace", "fit", store, EXCERPT), "24 MoE layers of 32 experts")


def test_a_store_is_fitted_and_simulated(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    trace = tmp_path / "trace.npz"
    random_trace(0, prompts=(4, 4), answers=(200, 200), layers=8, experts=32, picks=4).save(trace)
    fitted = run("trace", "fit", copy, trace, "--epochs", "1")
    assert fitted.exit_code == 0, fitted.stderr
    assert "has learned from 408 tokens of 2 request(s)" in fitted.stderr
    load_nets(copy / NETS_FILE, Shape(8, 32, 4))
    told = run("simulate", trace, "--slots", "8", "--store", copy, "--fit", "none", "--json")
    assert told.exit_code == 0, told.stderr
    assert set(json.loads(told.stdout)) == KEYS
    assert_user_error(run("trace", "fit", copy, trace, "--epochs", "0"), "epochs is 0")
