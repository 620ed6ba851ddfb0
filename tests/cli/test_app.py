"""The command line as a whole."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import moestro
from cli.running import run, run_process

COMMANDS = ("generate", "pack", "inspect", "plan", "demo")


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"moestro {moestro.__version__}\n"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f" {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_debug(name: str) -> None:
    result = run(name, "-h")
    assert result.exit_code == 0
    assert "--debug" in result.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate"], ["generate", "x", "--nonsense"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


def test_starting_imports_nothing_slow() -> None:
    script = (
        "import sys; sys.argv = ['moestro', '--version']\n"
        "import atexit; atexit.register(lambda: print(*{'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
        "from moestro.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == f"moestro {moestro.__version__}\n\n"


def test_warnings_become_notes(capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", "nothing-here")
    logging.getLogger("moestro.memory").warning("two\nlines about %s", "reads")
    assert capsys.readouterr().err == "note: two lines about reads\n"


def test_as_a_process_an_error_is_one_paragraph() -> None:
    result = run_process("generate", "nothing-here", "--prompt", "x")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: There is no model 'nothing-here'.")
    assert result.stderr.count("\n") == 1
