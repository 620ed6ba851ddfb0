"""`moestro variants route` in this process, on a store with two variants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.running import assert_user_error, run
from domain.domains import examples, texts
from routed_store import routed_store

SUMS = "sum " + texts("sums", 1, seed=3)[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_store(tmp_path_factory.mktemp("routed"), examples())


@pytest.fixture
def store(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "store"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Flags with a text file of the base's prompts, JSON lines of the others'."""
    (tmp_path / "base.txt").write_text("\f".join(examples()["base"]))
    flags = ["--examples", f"base={tmp_path / 'base.txt'}"]
    for name in ("code", "sums"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in examples()[name]))
        flags += ["--examples", f"{name}={file}"]
    return flags


@pytest.mark.parametrize("classifier", ["text", "trace"])
def test_fit_eval_show(store: Path, files: list[str], classifier: str) -> None:
    opening = ["--memory", "64MB"]
    extra = ["--classifier", classifier, "--threshold", "0.4"]
    fitted = run("variants", "route", "fit", store, *files, *extra, *opening)
    assert fitted.exit_code == 0, fitted.output
    assert "6 of base, 6 of code, 6 of sums" in fitted.stdout
    judged = run("variants", "route", "eval", store, *files, *opening, "--json")
    report = json.loads(judged.stdout)
    assert (report["classifier"], report["threshold"], report["prompts"]) == (classifier, 0.4, 18)
    assert report["accuracy"] > 0.9
    assert (report["domain_tokens"] > 0) == (classifier == "trace")
    table = run("variants", "route", "eval", store, *files, *opening, "--most-examples", "2").stdout
    assert "of 6 prompts" in table
    assert ("extra work" in table) == (classifier == "trace")
    shown = run("variants", "route", "show", store, SUMS, *opening, "--json")
    choice = json.loads(shown.stdout)
    assert (choice["variant"], choice["domain"]) == ("sums", "sums")
    assert "sums" in run("variants", "route", "show", store, SUMS, *opening).stdout


def test_generate_with_auto(store: Path) -> None:
    prompt = texts("code", 1, seed=4)[0]
    common = ("--memory", "64MB", "--max-tokens", "4", "--prompt", prompt, "--json")
    auto = json.loads(run("generate", f"{store}:auto", *common).stdout)
    named = json.loads(run("generate", f"{store}:code", *common).stdout)
    assert auto["text"] == named["text"]
    assert auto["choice"]["variant"] == "code"
    assert auto["choice"]["confidence"] > 0.5
    assert "choice" not in named


def test_a_file_of_requests_tells_who_answered(store: Path, tmp_path: Path) -> None:
    prompts = {name: texts(name, 1, seed=4)[0] for name in ("code", "sums")}
    lines: list[dict[str, object]] = [
        {"prompt": prompts["code"]},
        {"messages": [{"role": "system", "content": prompts["code"]}, {"role": "user", "content": prompts["sums"]}]},
        {"prompt": prompts["code"], "variant": "sums"},
    ]
    (store / "chat_template.jinja").write_text("{% for one in messages %}{{ one['content'] }}{% endfor %}")
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    common = ("--memory", "64MB", "--max-tokens", "4", "--prompt-file", file)
    result = run("generate", f"{store}:auto", *common, "--out", out)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one.get("choice", {}).get("variant") for one in answers] == ["code", "sums", None]
    assert 0.5 < answers[0]["choice"]["confidence"] <= 1
    file.write_text(json.dumps({**lines[0], "variant": "auto"}) + "\n")
    assert run("generate", store, *common, "--out", tmp_path / "named.jsonl").exit_code == 0
    assert json.loads((tmp_path / "named.jsonl").read_text())["token_ids"] == answers[0]["token_ids"]
    (store / "variants" / "domains.npz").unlink()
    assert_user_error(run("generate", store, *common, "--out", tmp_path / "none.jsonl"), "Line 1", "no router")


def test_bad_input(store: Path, files: list[str], tmp_path: Path) -> None:
    fit = ("variants", "route", "fit", store)
    assert_user_error(run(*fit, "--examples", "code"), "NAME=FILE")
    assert_user_error(run(*fit, "--examples", f"code={tmp_path / 'none.txt'}"), "none.txt")
    assert_user_error(run(*fit, *files[2:]), "base=FILE")
    assert_user_error(run(*fit, *files, "--threshold", "3"), "threshold")
    assert_user_error(run(*fit, *files, "--layers", "2"), "layers")
    assert_user_error(run(*fit, *files[:4], "--examples", files[5].replace("sums=", "poems=")), "poems", "code, sums")
    assert_user_error(run("variants", "route", "eval", store, *files, "--most-examples", "-1"), "most_examples")
    assert_user_error(run("variants", "route", "show", tmp_path, "hello"), "neither a store")
    (store / "variants" / "domains.npz").write_bytes(b"PK")
    assert_user_error(run("variants", "route", "show", store, "hello"), "domains.npz", "damaged", "route fit")
    assert_user_error(run("generate", f"{store}:auto", "--memory", "64MB", "--prompt", "x"), "domains.npz")
