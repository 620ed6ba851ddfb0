"""`moestro variants`, from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli.damage import flip_bit, truncate
from cli.running import assert_user_error, run
from families import save_checkpoint
from fine_tunes import base_checkpoint, fine_tune
from moestro import LLM, SamplingParams
from packing import pack_raw


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(base, tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.fixture(scope="module")
def with_one(base: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the variant `one`. Do not change it."""
    store = pack_raw(base, tmp_path_factory.mktemp("store") / "store").path
    result = run("variants", "add", store, "one", tuned, "--no-calibration")
    assert result.exit_code == 0, result.output
    assert "added one" in result.stdout
    return store


@pytest.fixture
def store(with_one: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(with_one, tmp_path / "store"))


def test_what_there_is(with_one: Path) -> None:
    listed = json.loads(run("variants", "list", with_one, "--json").stdout)["variants"]
    shown = json.loads(run("variants", "show", with_one, "one", "--verify", "--json").stdout)
    assert shown.pop("problems") == []
    assert listed == [shown]
    assert shown["name"] == "one"
    assert shown["source"] == "tuned"
    assert (shown["method"], shown["bits"], shown["salient"]) == ("me-switch", 2, 0.02)
    assert shown["changed_experts"] == shown["experts"] == 24
    folder = with_one / "variants" / "one"
    files = sum((folder / name).stat().st_size for name in ("experts.planes", "dense.safetensors"))
    assert shown["bytes"] == files
    assert "one" in run("variants", "list", with_one).stdout
    assert "every byte is as written" in run("variants", "show", with_one, "one", "--verify").stdout


def test_more_bits_are_more_bytes_and_removing_takes_them_away(store: Path, tuned: Path) -> None:
    result = run("variants", "add", store, "four", tuned, "--bits", "4", "--salient", "0")
    assert result.exit_code == 0, result.output
    two, four = (json.loads(run("variants", "show", store, name, "--json").stdout) for name in ("one", "four"))
    assert four["bytes"] > two["bytes"]
    assert run("variants", "remove", store, "four").exit_code == 0
    assert [path.name for path in (store / "variants").iterdir()] == ["one"]
    assert_user_error(run("variants", "remove", store, "four"), "four", "It has: one")


def test_published_neighbours_are_methods(store: Path, tuned: Path) -> None:
    signs = ("--method", "bitdelta", "--bits", "1", "--salient", "0")
    assert run("variants", "add", store, "signs", tuned, *signs).exit_code == 0
    result = run("variants", "add", store, "vectors", tuned, "--method", "delta-come")
    assert result.exit_code == 0, result.output
    one, vectors = (json.loads(run("variants", "show", store, name, "--json").stdout) for name in ("one", "vectors"))
    assert (vectors["method"], vectors["bits"], vectors["salient"]) == ("delta-come", 2, 0.0)
    assert 0.8 * one["bytes"] < vectors["bytes"] <= 1.1 * one["bytes"]
    assert "delta-come, 2 bits, not calibrated" in run("variants", "list", store).stdout
    with LLM(store, memory="64MB", context=64) as llm:
        answers = llm.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=8), variant=["", "signs", "vectors"])
        assert llm.stats().path == "general"
    assert all(len(one.token_ids) == 8 for one in answers)
    for flags in (["--distill-steps", "5"], ["--calibrate", "text.txt"]):
        refused = run("variants", "add", store, "more", tuned, "--method", "delta-come", *flags)
        assert_user_error(refused, "delta-come", "uses no text")


def test_a_store_has_the_name_that_other_commands_know(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    assert_user_error(run("variants", "list", base), "no store of it yet", "moestro pack")
    result = run("variants", "add", base, "one", tuned, "--no-calibration")
    assert result.exit_code == 0, result.output
    assert "added one" in result.stdout
    listed = json.loads(run("variants", "list", base, "--json").stdout)["variants"]
    assert [one["name"] for one in listed] == ["one"]
    with LLM(f"{base}:one", memory="64MB", context=64) as llm:
        assert llm.variants() == ("one",)
        assert llm.generate([1, 2], SamplingParams(max_tokens=2))[0].token_ids
    assert run("variants", "remove", base, "one").exit_code == 0


def test_inspecting_a_store_looks_at_its_variants(store: Path) -> None:
    whole = run("inspect", store, "--verify", "--json")
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout)["variants"] == ["one"]
    file = store / "variants" / "one" / "experts.planes"
    flip_bit(file, file.stat().st_size // 2)
    assert run("inspect", store).exit_code == 0
    found = run("inspect", store, "--verify", "--json")
    assert found.exit_code == 2
    (problem,) = json.loads(found.stdout)["problems"]
    assert "Of the variant one, the plane of expert" in problem
    flip_bit(store / "variants" / "one" / "variant.json", 300)
    (store / "variants" / "domains.npz").write_bytes(b"PK")
    problems = json.loads(run("inspect", store, "--verify", "--json").stdout)["problems"]
    assert len(problems) == 2
    assert "variant.json is damaged" in problems[0]
    assert "domains.npz" in problems[1]


def test_damage_is_named_and_hides_no_other(store: Path, tuned: Path) -> None:
    assert run("variants", "add", store, "two", tuned).exit_code == 0
    flip_bit(store / "variants" / "one" / "variant.json", 300)
    assert_user_error(run("variants", "show", store, "one"), "variant.json", "damaged")
    listed = run("variants", "list", store)
    assert listed.exit_code == 0
    assert "two" in listed.stdout
    assert "variant.json is damaged" in " ".join(listed.stderr.split())
    assert run("variants", "remove", store, "one").exit_code == 0


@pytest.mark.parametrize("name", ["experts.planes", "dense.safetensors"])
def test_files_that_are_not_whole(name: str, store: Path) -> None:
    file = store / "variants" / "one" / name
    flip_bit(file, file.stat().st_size // 2)
    found = run("variants", "show", store, "one", "--verify")
    assert found.exit_code == 2
    assert "damaged" in found.stderr
    truncate(file, 1)
    assert_user_error(run("variants", "show", store, "one"), name, "truncated")
    file.unlink()
    assert_user_error(run("variants", "show", store, "one"), name, "missing")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bits", "3"], ["bits is 3"]),
        (["--dense-delta-bits", "8"], ["dense_delta_bits is 8"]),
        (["--salient", "1.5"], ["salient is 1.5"]),
        (["--method", "magic"], ["method is 'magic'", "me-switch"]),
    ],
)
def test_options_that_are_none(flags: list[str], words: list[str], store: Path, tuned: Path) -> None:
    assert_user_error(run("variants", "add", store, "two", tuned, *flags), *words)


def test_bad_input_is_refused_by_name(store: Path, base: Path, tuned: Path, tmp_path: Path) -> None:
    assert_user_error(run("variants", "add", store, "one", tuned), "one already")
    assert_user_error(run("variants", "add", store, "../out", tuned), "cannot be named")
    assert_user_error(run("variants", "add", store, "a:b", tuned), "cannot be named")
    assert_user_error(run("variants", "list", tmp_path / "nowhere"), "There is no model")
    assert_user_error(run("variants", "add", store, "two", store), "is a store already")
    assert_user_error(run("variants", "add", store, "two", tmp_path / "nowhere"), "There is no model")
    assert_user_error(run("variants", "add", store, "two", base, "--no-calibration"), "is the base")
    save_checkpoint("mixtral", tmp_path / "mixtral", dtype=torch.bfloat16)
    assert_user_error(run("variants", "add", store, "two", tmp_path / "mixtral"), "another architecture", "mixtral")


def test_another_vocabulary_or_tokenizer_is_refused(store: Path, tuned: Path, tmp_path: Path) -> None:
    wider = Path(shutil.copytree(tuned, tmp_path / "wider"))
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "vocab_size": 168}))
    assert_user_error(run("variants", "add", store, "two", wider), "another vocabulary", "vocab_size")
    turned = Path(shutil.copytree(tuned, tmp_path / "turned"))
    (turned / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    assert_user_error(run("variants", "add", store, "two", turned), "num_experts_per_tok")
    (store / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    other = Path(shutil.copytree(tuned, tmp_path / "other"))
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    assert_user_error(run("variants", "add", store, "two", other), "another tokenizer", "tokenizer.json")
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 1, "a": 0}}}, indent=1))
    assert run("variants", "add", store, "two", other).exit_code == 0
