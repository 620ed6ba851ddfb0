"""`moestro eval`: what is measured and printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.damage import truncate
from cli.running import MODEL, assert_user_error, run, run_process
from engine.tiny import tiny_checkpoint
from moestro.config import PackOptions
from moestro.engine.results import Evaluation
from moestro.store.pack import pack

WORDS = "A command that measures a model reads text and says how likely the model finds each of its words.\n"
KEYS = {
    "model",
    "perplexity",
    "loss",
    "kl_to_raw",
    "raw_perplexity",
    "same_choice",
    "level",
    "bits_per_weight",
    "dense_bits",
    "tokens",
    "windows",
    "window",
    "tokens_per_s",
    "memory_bytes",
    "process_floor_bytes",
    "peak_rss_bytes",
    "texts",
}
"""Published: keys may be added here, never changed or taken away."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text(WORDS * 6)
    return file


def _eval(*arguments: str | Path, memory: str = "100MiB", window: int = 32) -> list[str | Path]:
    return ["eval", *arguments, "--memory", memory, "--window", str(window)]


def test_json_is_one_object_with_the_published_keys(store: Path, text: Path) -> None:
    result = run(*_eval(store, "--text", text, "--reference", MODEL, "--json"))
    assert result.exit_code == 0
    measured = json.loads(result.stdout)
    assert measured.keys() == KEYS
    assert set(Evaluation.__dataclass_fields__) == KEYS - {"model"}
    assert (measured["kl_to_raw"], measured["raw_perplexity"]) == (0.0, measured["perplexity"])
    assert (measured["level"], measured["bits_per_weight"], measured["dense_bits"]) == (16, 16.0, 16)
    assert measured["tokens"] == 31 * measured["windows"]
    assert [one["name"] for one in measured["texts"]] == [str(text)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_a_checkpoint_is_packed_twice_and_measured_against_its_raw_weights(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing is not calibrated here, which takes longer: `test_generate` has a model packed so."""
    monkeypatch.setattr("moestro.store.locate.AUTOMATIC", PackOptions(calibration=False))
    packed = json.loads(run(*_eval(checkpoint, "--text", text, "--json")).stdout)
    raw = json.loads(run(*_eval(checkpoint, "--text", text, "--raw", "--json")).stdout)
    assert (packed["level"], raw["level"], raw["kl_to_raw"]) == (4, 32, 0.0)
    assert packed["raw_perplexity"] == raw["perplexity"] != packed["perplexity"]
    assert 0 < packed["kl_to_raw"] < 1
    low = json.loads(run(*_eval(checkpoint, "--text", text, "--level", "2", "--json")).stdout)
    assert (low["level"], low["raw_perplexity"]) == (2, raw["perplexity"])
    assert low["kl_to_raw"] > packed["kl_to_raw"]
    assert low["bits_per_weight"] < packed["bits_per_weight"]


def test_no_auto_pack_refuses(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = run(*_eval(checkpoint, "--text", text, "--no-auto-pack"), env={"MOESTRO_CACHE": str(tmp_path / "none")})
    assert_user_error(result, "moestro pack")


def test_what_cannot_be_measured_is_said(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    packed = pack(checkpoint, tmp_path / "store", options=PackOptions(calibration=False)).path
    result = run(*_eval(packed, "--text", text))
    assert result.exit_code == 0
    assert result.stderr.startswith("note: kl_to_raw was not measured")
    assert "--reference" in result.stderr
    assert "KL" not in result.stdout
    assert_user_error(run(*_eval(packed, "--text", text, "--raw")), "not hold raw weights")
    assert_user_error(run(*_eval(packed, "--text", text, "--reference", MODEL)), "is another model")
    assert_user_error(run(*_eval(packed, "--text", text, "--level", "7")), "Level 7")


def test_the_table_names_what_was_measured(store: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("1 + 2 = 3\n" * 40)
    result = run(*_eval(store, "--text", text, "--text", other))
    assert result.exit_code == 0
    for words in ("perplexity", "bits per weight", "16.000", "tokens scored", str(text), str(other)):
        assert words in result.stdout


def test_max_tokens_bounds_the_windows(store: Path, text: Path) -> None:
    measured = json.loads(run(*_eval(store, "--text", text, "--max-tokens", "70", "--json")).stdout)
    assert (measured["windows"], measured["tokens"]) == (2, 62)


def test_the_memory_is_kept(store: Path, text: Path) -> None:
    done = run_process(*_eval(store, "--text", text, "--json", memory="31MiB"))
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["memory_bytes"] == 31 << 20
    assert measured["peak_rss_bytes"] <= measured["process_floor_bytes"] + measured["memory_bytes"]


def test_bad_texts(store: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text("Too short.")
    for name, words in (("empty", "is empty"), ("bytes", "UTF-8"), ("short", "fewer than a window")):
        assert_user_error(run(*_eval(store, "--text", text, "--text", tmp_path / name)), name, words)
    assert_user_error(run(*_eval(store, "--text", "no/such/file")), "no/such/file: No such file or directory")
    assert run(*_eval(store)).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--raw", "--reference", MODEL], "Give one of the two"),
        (["--raw", "--level", "4"], "Give one of the two"),
        (["--max-tokens", "31"], "max_tokens is 31"),
        (["--max-tokens", "-1"], "max_tokens is -1"),
        (["--window", "2000"], "window is 2000"),
        (["--memory", "1MiB"], "too little"),
        (["--policy", "belady"], "lru"),
        (["--quality", "best"], "balanced"),
        (["--level-policy", "best"], "ledger"),
        (["--reference", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_requests(store: Path, text: Path, arguments: list[str], words: str) -> None:
    assert_user_error(run(*_eval(store, "--text", text), *arguments), words)


def test_a_damaged_store_is_named(damaged: Path, text: Path) -> None:
    truncate(damaged / "experts.planes", 4096)
    assert_user_error(run(*_eval(damaged, "--text", text)), "experts.planes", "truncated")
