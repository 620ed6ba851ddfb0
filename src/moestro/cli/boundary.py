"""Where exceptions become exit codes: 2 for what the user can mend, 130 for Ctrl-C, a traceback for our own bugs."""

from __future__ import annotations

import inspect
import io
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from moestro.cli.options import Command, with_parameters
from moestro.errors import MoestroError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

DebugFlag = Annotated[bool, typer.Option("--debug", envvar="MOESTRO_DEBUG", help="Show the traceback of an error.")]


def paragraph(label: str, message: object) -> str:
    """`label: message` on one line, however many lines the message had."""
    return f"{label}: {' '.join(str(message).split())}"


def say(label: str, message: object) -> None:
    """Write one paragraph to standard error."""
    sys.stderr.write(paragraph(label, message) + "\n")
    sys.stderr.flush()


def fail(message: object) -> NoReturn:
    """End the command with one paragraph and the exit code of a user's error."""
    say("error", message)
    raise typer.Exit(EXIT_USER_ERROR)


def guarded(function: Command) -> Command:
    """Give a command the `--debug` flag, and its errors a form that a user can read."""
    hints = get_type_hints(function, include_extras=True)
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
        ),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugFlag),
    ]

    def command(ctx: typer.Context, debug: bool, **values: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # models write what a terminal's encoding may not have
        try:
            function(**values)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_standard_output()
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (MoestroError, OSError) as error:
            if debug or ctx.obj:
                traceback.print_exc()
            fail(_message(error))

    return with_parameters(command, function, parameters)


def _message(error: MoestroError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}."
    return str(error)


def _forget_standard_output() -> None:
    """The reader of our output has gone: let the interpreter's last flush go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
