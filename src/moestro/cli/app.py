"""The command line as a whole: which commands there are, and what is set up before any of them runs."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Annotated

import typer

import moestro
from moestro.cli.bench import bench
from moestro.cli.bench_serve import bench_serve
from moestro.cli.boundary import DebugFlag, guarded, say
from moestro.cli.chat import chat
from moestro.cli.demo import demo
from moestro.cli.doctor import doctor
from moestro.cli.eval import evaluate
from moestro.cli.generate import generate
from moestro.cli.inspect import inspect
from moestro.cli.options import Command, spread_options
from moestro.cli.pack import pack
from moestro.cli.plan import plan
from moestro.cli.ps import ps
from moestro.cli.serve import serve
from moestro.cli.simulate import simulate
from moestro.cli.trace import export_, fit, import_, record, show
from moestro.cli.variants import add, list_, remove
from moestro.cli.variants import show as show_variant

app = typer.Typer(
    help="Run mixture-of-experts language models that are larger than memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (generate, chat, serve, ps, pack, inspect, plan, bench, demo, simulate, doctor):
    app.command()(guarded(spread_options(_command)))
app.command("eval")(guarded(spread_options(evaluate)))
app.command("bench-serve")(guarded(spread_options(bench_serve)))

_trace = typer.Typer(
    help="Record, show and convert traces of which experts models use.", no_args_is_help=True, add_completion=False
)
_trace_commands: dict[str, Command] = {"record": record, "show": show, "export": export_, "import": import_, "fit": fit}
for _name, _subcommand in _trace_commands.items():
    _trace.command(_name)(guarded(spread_options(_subcommand)))
app.add_typer(_trace, name="trace")

_variants = typer.Typer(
    help="Keep fine-tunes of a store's base in it, as differences of few bits.",
    no_args_is_help=True,
    add_completion=False,
)
_variants_commands: dict[str, Command] = {"add": add, "list": list_, "show": show_variant, "remove": remove}
for _name, _subcommand in _variants_commands.items():
    _variants.command(_name)(guarded(spread_options(_subcommand)))
app.add_typer(_variants, name="variants")


class _Notes(logging.Handler):
    """Warnings of the rooms below become `note: ...` on standard error, with the traceback of what was not foreseen."""

    def emit(self, record: logging.LogRecord) -> None:
        say("note", record.getMessage())
        if record.exc_info:
            traceback.print_exception(*record.exc_info)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moestro {moestro.__version__}")
        raise typer.Exit


@app.callback()
def before(
    ctx: typer.Context,
    debug: DebugFlag = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run mixture-of-experts language models that are larger than memory."""
    ctx.obj = debug
    logger = logging.getLogger("moestro")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))
    # What transformers has to say is about its own loaders, which moestro does not use.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
