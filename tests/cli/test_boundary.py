"""Exceptions become exit codes and paragraphs."""

from __future__ import annotations

import errno

import pytest
import typer
from typer.testing import CliRunner, Result

from cli.running import assert_user_error, run
from moestro.cli.boundary import guarded, paragraph
from moestro.errors import StoreError


def _run(error: BaseException, *arguments: str, **options: object) -> Result:
    """The outcome of a command that raises `error`."""
    app = typer.Typer()

    def command() -> None:
        raise error

    app.command()(guarded(command))
    return CliRunner().invoke(app, list(arguments), **options)  # type: ignore[arg-type]


def test_a_users_error_is_one_paragraph() -> None:
    assert_user_error(_run(StoreError("first line\n  second line.")), "error: first line second line.")


def test_a_missing_file_is_a_users_error() -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/some/where")
    assert_user_error(_run(error), "error: /some/where: No such file or directory.")


def test_an_error_of_the_system_without_a_file() -> None:
    assert_user_error(_run(OSError(errno.ENOSPC, "No space left on device")), "error: No space left on device.")


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_debug_shows_the_traceback(way: str) -> None:
    flags, environment = (["--debug"], {}) if way == "flag" else ([], {"MOESTRO_DEBUG": "1"})
    result = _run(StoreError("damaged."), *flags, env=environment)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: damaged.\n")


@pytest.mark.parametrize("arguments", [["--debug", "plan", "nothing-here"], ["plan", "nothing-here", "--debug"]])
def test_debug_works_before_and_after_the_command(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_interruption_is_quiet() -> None:
    result = _run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.output == ""


def test_our_own_bugs_are_not_hidden() -> None:
    result = _run(AssertionError("broken invariant"))
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)


def test_a_paragraph_is_one_line() -> None:
    assert paragraph("note", "  a\n\nb\tc ") == "note: a b c"
