"""Running the command line: inside this process where that is enough, as a process where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from moestro.cli.app import app

MODEL = "tiny-qwen3moe-28m"


def run(*arguments: str | Path, **options: Any) -> Result:
    """Run a command inside this process. An exception that is not an exit comes out as it is."""
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False, **options)


def command(*arguments: str | Path) -> list[str]:
    """The command as a process."""
    return [sys.executable, "-m", "moestro.cli", *(str(one) for one in arguments)]


def run_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a process to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, check=False, **options)


def assert_user_error(result: Result, *words: str) -> None:
    """One paragraph on standard error with all of `words`, exit code 2, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[0].endswith((".", ")"))
    for word in words:
        assert word in lines[0]
