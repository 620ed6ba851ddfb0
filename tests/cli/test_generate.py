"""`moestro generate`: what is printed where."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cli.running import MODEL, assert_user_error, command, run, run_process
from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.engine.results import Stats

PROMPT = "def main(argv):\n    "
TOP_KEYS = {"text", "token_ids", "finish_reason", "prompt_tokens", "timings", "stats"}
TIMING_KEYS = {"load_s", "ttft_s", "decode_tokens_per_s", "prefill_tokens_per_s"}
STATS_KEYS = {
    "domain_s",
    "domain_tokens",
    "hits",
    "misses",
    "evictions",
    "prefetches",
    "late_prefetches",
    "wasted_prefetches",
    "wasted_bytes",
    "cancelled_prefetches",
    "prefetch_recall",
    "prefetch_precision",
    "bytes_read",
    "prefetched_bytes",
    "stall_s",
    "demand_stall_s",
    "late_prefetch_stall_s",
    "slowest_read_s",
    "wall_s",
    "time_s",
    "compute_s",
    "expert_s",
    "peak_rss_bytes",
    "process_floor_bytes",
    "memory_bytes",
    "model_bytes",
    "dense_bytes",
    "expert_bytes",
    "arena_bytes",
    "kv_bytes",
    "activation_bytes",
    "staging_bytes",
    "variants",
    "level",
    "policy",
    "predictor",
    "ahead",
    "level_policy",
    "levels_applied",
    "path",
    "direct_io",
    "huge_pages",
}
"""Published: keys may be added here, never changed or taken away."""


def _options(**values: object) -> list[str]:
    chosen = {"memory": "40MiB", "context": 256, "max-tokens": 12, **values}
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def expected(store: Path) -> str:
    with LLM(store, memory="100MiB", context=256) as llm:
        return llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].text


def test_only_the_text_is_on_standard_output(store: Path, expected: str) -> None:
    result = run_process("generate", store, "--prompt", PROMPT, *_options())
    assert result.returncode == 0
    assert result.stdout == expected
    assert "12 tokens (length)" in result.stderr
    assert "Traceback" not in result.stderr


def test_json_is_one_object_with_the_published_keys(store: Path, expected: str) -> None:
    result = run("generate", store, "--prompt", PROMPT, "--json", *_options())
    assert result.exit_code == 0
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert answer.keys() == TOP_KEYS
    assert answer["timings"].keys() == TIMING_KEYS
    assert answer["stats"].keys() == STATS_KEYS
    assert {field.name for field in fields(Stats)} == STATS_KEYS
    assert answer["text"] == expected
    assert len(answer["token_ids"]) == 12
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["memory_bytes"] == 40 << 20
    assert answer["stats"]["misses"] > 0


def test_a_quality_may_be_given_up_for_speed(quantised: Path) -> None:
    options = _options(memory="28MiB", quality="fast", **{"level-policy": "gate"})
    stats = json.loads(run("generate", quantised, "--prompt", PROMPT, "--json", *options).stdout)["stats"]
    assert stats["level_policy"] == "gate"
    assert list(stats["levels_applied"]) == ["0", "2", "3", "4"]
    assert 0 < stats["levels_applied"]["4"] < sum(stats["levels_applied"].values())
    exact = json.loads(run("generate", quantised, "--prompt", PROMPT, "--json", *_options(memory="28MiB")).stdout)
    assert exact["stats"]["bytes_read"] > stats["bytes_read"]
    assert set(exact["stats"]["levels_applied"].values()) == {0}
    wrong = run("generate", quantised, "--prompt", PROMPT, *_options(quality="best"))
    assert_user_error(wrong, "'best'", "balanced")


def test_prompts_come_from_a_file_or_standard_input(store: Path, expected: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    assert run("generate", store, "--prompt-file", tmp_path / "prompt", *_options()).stdout == expected
    assert run("generate", store, "--prompt-file", "-", *_options(), input=PROMPT).stdout == expected


def test_chat_uses_the_models_template(store: Path) -> None:
    with LLM(store, memory="100MiB", context=256) as llm:
        prompt = llm.tokenizer.decode(llm.chat_prompt([{"role": "user", "content": "Hello"}]))
    assert prompt != "Hello"
    wrapped = run("generate", store, "--prompt", "Hello", "--chat", *_options())
    assert wrapped.exit_code == 0
    assert wrapped.stdout == run("generate", store, "--prompt", prompt, *_options()).stdout


def test_a_model_without_a_template_is_named(store: Path, damaged_template: Path) -> None:
    result = run("generate", damaged_template, "--prompt", "Hello", "--chat", *_options())
    assert_user_error(result, "has no chat template")


@pytest.fixture
def damaged_template(tmp_path: Path) -> Path:
    """A store of the built-in model without its chat template."""
    import shutil

    from moestro.store.locate import locate_source
    from packing import pack_raw

    source = Path(shutil.copytree(locate_source(MODEL), tmp_path / "plain"))
    (source / "chat_template.jinja").unlink()
    return pack_raw(source, tmp_path / "plain-store").path


def test_a_timeline_is_written(store: Path, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    result = run("generate", store, "--prompt", PROMPT, "--json", "--timeline", path, *_options(prefetch="off"))
    answer, timeline = json.loads(result.stdout), json.loads(path.read_text())
    assert answer["text"] == expected
    read = [event["args"]["bytes"] for event in timeline["traceEvents"] if event.get("cat") == "read"]
    assert sum(read) == answer["stats"]["bytes_read"] > 0
    assert sum(answer["stats"]["time_s"].values()) == pytest.approx(answer["stats"]["wall_s"], rel=0.05)


def test_a_file_of_requests_is_answered_line_by_line(store: Path, expected: str, tmp_path: Path) -> None:
    many, out = tmp_path / "many.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": PROMPT}, {"prompt": "The", "id": "b", "max_tokens": 2}, {"prompt": PROMPT, "max_tokens": 12}]
    many.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("generate", store, "--prompt-file", many, "--out", out, *_options())
    result = run(*arguments, "--json", "--timeline", tmp_path / "timeline.json")
    assert result.exit_code == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [1, "b", 3]
    assert [answer["text"] for answer in answers[::2]] == [expected] * 2
    report = json.loads(result.stdout)
    assert (report["requests"], report["answered_before"], report["tokens"]) == (3, 0, 26)
    assert report["tokens_per_s"] == pytest.approx(26 / report["elapsed_s"])
    assert json.loads((tmp_path / "timeline.json").read_text())["otherData"]["left_out"] == 0
    again = run(*arguments)
    assert (again.exit_code, again.stdout) == (0, "")
    assert "all 3 requests had been answered" in again.stderr
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    assert "3 requests answered, 2 of them before: 12 tokens" in run(*arguments).stderr


def test_files_of_requests_that_do_not_do(store: Path, tmp_path: Path) -> None:
    many, out = tmp_path / "many.jsonl", tmp_path / "answers.jsonl"
    many.write_text('{"prompt": "a"}\n{"prompt": "a", "top": 1}\n')
    assert_user_error(run("generate", store, "--prompt-file", many, "--out", out), "Line 2 of", "top")
    assert not out.exists()
    assert_user_error(run("generate", store, "--prompt", "a", "--out", out), "--prompt cannot be given with --out")
    assert_user_error(run("generate", store, "--out", out), "--prompt-file")
    many.write_text('{"prompt": "a"}\n')
    nowhere = tmp_path / "no" / "answers.jsonl"
    assert_user_error(run("generate", store, "--prompt-file", many, "--out", nowhere), "No such file or directory")


def test_a_picture_is_written(store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "experts.png"
    assert run("generate", store, "--prompt", PROMPT, "--picture", picture, *_options()).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_packed_once_into_levels_that_can_be_asked_for(tmp_path: Path) -> None:
    """A smaller one than the built-in model, which takes a minute."""
    model, cache = tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "cache"
    arguments: list[Any] = ["generate", model, "--prompt", PROMPT, "--json"]
    env = {"MOESTRO_CACHE": str(cache)}
    answers = [run(*arguments, *_options(level=level), env=env) for level in (0, 4, 2)]
    texts, levels = zip(*((one["text"], one["stats"]["level"]) for one in map(_parsed, answers)), strict=True)
    assert levels == (4, 4, 2)
    assert texts[0] == texts[1]
    assert_user_error(run(*arguments, *_options(level=5), env=env), "Level 5", "levels 2, 3, 4, 8")
    assert len([*cache.glob("**/manifest.json")]) == 1


def _parsed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_no_auto_pack_refuses(tmp_path: Path) -> None:
    result = run(
        "generate", MODEL, "--prompt", PROMPT, "--no-auto-pack", *_options(), env={"MOESTRO_CACHE": str(tmp_path)}
    )
    assert_user_error(result, "moestro pack")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt-file"),
        (["--prompt", "a", "--prompt-file", "b"], "either"),
        (["--prompt", ""], "empty"),
        (["--prompt-file", "no/such/file"], "no/such/file: No such file or directory"),
        (["--prompt", "a", "--picture", "picture.jpg"], ".png"),
        (["--prompt", "a", "--picture", "no/such/folder/picture.png"], "does not exist"),
        (["--prompt", "a", "--timeline", "no/such/folder/timeline.json"], "does not exist"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "a", "--policy", "belady"], "lru"),
    ],
)
def test_bad_requests(store: Path, arguments: list[str], words: str) -> None:
    assert_user_error(run("generate", store, *arguments), words)


def test_an_empty_file_and_one_that_is_no_text(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert_user_error(run("generate", store, "--prompt-file", tmp_path / "empty"), "empty")
    assert_user_error(run("generate", store, "--prompt-file", tmp_path / "bytes"), "UTF-8")


def test_interruption_and_a_reader_that_leaves_are_quiet(store: Path) -> None:
    arguments = command("generate", store, "--prompt", PROMPT, *_options(**{"max-tokens": 240, "ignore-eos": ""})[:-1])
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    interrupted, deserted = running
    for process in running:
        assert process.stdout is not None
        assert process.stdout.read(1)
    interrupted.send_signal(signal.SIGINT)
    assert deserted.stdout is not None
    deserted.stdout.close()
    for process, code in ((interrupted, 130), (deserted, 141)):
        assert process.stderr is not None
        assert process.wait(timeout=60) == code
        assert process.stderr.read() == b""
        process.stderr.close()
    assert interrupted.stdout is not None
    interrupted.stdout.close()


def test_what_changes_nothing_at_temperature_zero_is_said(store: Path) -> None:
    result = run("generate", store, "--prompt", PROMPT, "--seed", "3", "--top-k", "5", *_options())
    assert result.exit_code == 0
    assert "note: top_k, seed changes nothing at temperature 0" in result.stderr
