"""`moestro bench-serve`: many clients against a running server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.chat import ApiKey
from moestro.cli.console import Row, print_json, print_table
from moestro.cli.progress import Lines
from moestro.client.connection import Connection
from moestro.client.load import run_load, summarise
from moestro.config import LoadOptions


class _Done:
    """How many answers there are."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total


def bench_serve(
    url: Annotated[str, typer.Argument(help="The server: http://127.0.0.1:8000.")],
    options: LoadOptions,
    api_key: ApiKey = "",
    out: Annotated[Path | None, typer.Option(help="Write the figures to a JSON file.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server under load: times to the first token, between tokens and to the end; tokens a second."""
    import json

    connection = Connection(url, key=api_key, timeout_s=options.timeout)
    lines: Lines[_Done] = Lines(lambda now: say("note", f"{now.done} of {now.total} answered"))
    samples = run_load(connection, options, progress=lambda done: lines(_Done(done, options.requests)))
    figures = {"url": url, "options": asdict(options), **summarise(samples, options)}
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(figures)
    else:
        _draw(figures)


def _draw(figures: dict[str, Any]) -> None:
    rows: list[Row] = [
        ("answered", f"{figures['answered']} of {figures['requests']}", f"in {figures['wall_s']:.2f} s"),
        ("tokens per second", f"{figures['generated_tokens_per_s']:.1f}", "written"),
        ("requests per second", f"{figures['requests_per_s']:.2f}", f"{figures['goodput_requests_per_s']:.2f} good"),
    ]
    names = {"ttft_ms": "first token", "itl_ms": "between tokens", "tpot_ms": "mean of answers", "e2e_ms": "to the end"}
    for key, name in names.items():
        if figures[key]:
            rows.append((name, "  ".join(f"{rank} {value:.1f}" for rank, value in figures[key].items()), "ms"))
    print_table(figures["url"], rows)
    for message, count in figures["errors"].items():
        say("note", f"{count} request(s) failed: {message}")
