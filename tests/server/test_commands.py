"""`moestro chat`, `ps` and `bench-serve` against the running server."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from cli.running import assert_user_error, command, run, run_process
from moestro.server.registry import folder
from server.running import NAME, PROMPT, Running


def test_ps_lists_servers_that_are_alive_and_forgets_others(running: Running) -> None:
    dead = folder() / "1.json"
    dead.write_text(json.dumps({"pid": 1, "started": "0", "url": "http://x", "model": "x", "memory": "1"}))
    broken = folder() / "2.json"
    broken.write_text("{")
    listed = json.loads(run("ps", "--json").stdout)["servers"]
    (mine,) = [one for one in listed if one["pid"] == running.process.pid]
    assert (mine["url"], mine["model"], mine["status"]) == (running.url, NAME, "ok")
    assert not dead.exists()
    assert not broken.exists()
    assert f"{NAME}  {running.url}" in run("ps").stdout


def test_bench_serve_measures_every_request(running: Running, tmp_path: Path) -> None:
    flags = ["--requests", "5", "--prompt-tokens", "8", "--max-tokens", "4", "--json"]
    figures = json.loads(run("bench-serve", running.url, *flags, "--out", tmp_path / "f.json").stdout)
    assert figures == json.loads((tmp_path / "f.json").read_text())
    assert (figures["answered"], figures["prompt_tokens"], figures["generated_tokens"]) == (5, 40, 20)
    assert 0 < figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["max"] <= figures["e2e_ms"]["max"]
    assert figures["goodput_requests_per_s"] == figures["requests_per_s"]
    poisson = json.loads(run("bench-serve", running.url, *flags, "--rate", "50", "--ttft-slo", "0.0000001").stdout)
    assert poisson["answered"] == 5
    assert poisson["goodput_requests_per_s"] == 0
    assert "first token" in run("bench-serve", running.url, *flags[:-1]).stdout


def test_bench_serve_cuts_prompts_from_a_text(running: Running, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is not the crook in modern business that we fear. " * 20)
    flags = ["--requests", "3", "--prompt-tokens", "16", "--max-tokens", "2", "--json", "--text", text]
    figures = json.loads(run("bench-serve", running.url, *flags).stdout)
    assert figures["answered"] == 3
    assert 3 * 8 < figures["prompt_tokens"] < 3 * 48
    assert_user_error(run("bench-serve", running.url, *flags, "--prompt-tokens", "9999"), "39996", str(text))
    assert_user_error(run("bench-serve", running.url, "--text", tmp_path / "none.txt"), "none.txt", "cannot be read")


def test_a_conversation_with_a_server(running: Running, tmp_path: Path) -> None:
    saved = tmp_path / "talk.txt"
    lines = ["/help", "/retry", "Bridge\\", "and brook", "/system be kind", "/system", "hello", "/retry", "/bogus",
             f"/save {saved}", "/quit", "never"]  # fmt: skip
    flags = ["--max-tokens", "4", "--seed", "1", "--quality", "fast"]
    result = run("chat", running.url, *flags, input="\n".join(lines))
    assert result.exit_code == 0
    answers = saved.read_text().split("\n\n", 1)
    assert answers[0] == "user: hello"
    answer = answers[1].removeprefix("assistant: ").removesuffix("\n")
    assert result.stdout.endswith(f"{answer}\n{answer}\n")  # the same seed twice
    for words in ("/reset", "no question yet", "4 tokens (length)", "be kind", "no command /bogus"):
        assert words in result.stderr


def test_a_conversation_in_this_process(store: Path) -> None:
    result = run(
        "chat", store, "--memory", "60MiB", "--context", "64", "--max-tokens", "3", input=f"hi\n{PROMPT * 9}\n"
    )
    assert "3 tokens (length)" in result.stderr
    assert "experts" in result.stderr
    assert "error: The prompt" in result.stderr  # longer than the context; the conversation goes on


def test_ctrl_c_stops_an_answer(running: Running) -> None:
    import subprocess

    asked = command("chat", running.url, "--max-tokens", "200", "--temperature", "0")
    with subprocess.Popen(asked, stdin=-1, stdout=-1, stderr=-1, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        _, notes = process.communicate("/quit\n", timeout=30)
    assert process.returncode == 0
    assert "stopped" in notes


@pytest.mark.parametrize("name", ["chat", "bench-serve"])
def test_a_server_that_is_not_there(name: str) -> None:
    assert_user_error(run(name, "http://127.0.0.1:9"), "http://127.0.0.1:9", "cannot be reached", "moestro ps")
    assert_user_error(run("bench-serve", "ftp://x"), "no URL")


def test_flags_for_opening_a_model_do_not_go_with_a_server(running: Running) -> None:
    assert_user_error(run("chat", running.url, "--memory", "1GB"), "memory")


def test_commands_that_open_no_model_load_no_torch() -> None:
    result = run_process("ps", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert "moestro.server.registry" in result.stderr
    assert "torch" not in result.stderr
