"""Writes `docs/options.md` to standard output: `python -m moestro.cli.docs` (or `make docs`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from moestro.cli.options import flags_of
from moestro.config import (
    BenchOptions,
    ChatOptions,
    LoadOptions,
    PackOptions,
    RuntimeOptions,
    SamplingParams,
    ServeOptions,
    SimulateOptions,
    VariantOptions,
)

_HEAD = """\
# Options

Generated from `src/moestro/config.py` by `make docs`; do not edit. A flag wins over its environment variable, which
wins over the default. In Python the same names are keywords of `LLM(...)`, `SamplingParams(...)` and
`PackOptions(...)`.
"""

_SECTIONS = (
    (
        "How a model is opened",
        RuntimeOptions,
        "`generate` (all), `serve` and `chat` (all but max-sequences), `trace record` (all but prefix-cache and "
        "lend-kv), `bench` (all but these, max-sequences and learn), `plan` (memory, context, max-sequences, threads, "
        "level), `eval` (memory, level, quality, level-policy, threads, policy, auto-pack) and `demo` (level)",
    ),
    ("How tokens are picked", SamplingParams, "`generate` and `trace record`"),
    ("How a store is made", PackOptions, "`pack`; `generate` and others pack a checkpoint with the defaults"),
    ("How a fine-tune becomes a variant", VariantOptions, "`variants add`"),
    ("What is simulated", SimulateOptions, "`simulate`"),
    ("What is measured", BenchOptions, "`bench`"),
    ("How a server listens", ServeOptions, "`serve`, which also reads them from a TOML file (`--config`)"),
    ("How a conversation asks", ChatOptions, "`chat`"),
    ("What a server is asked under load", LoadOptions, "`bench-serve`"),
)


def options_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(line for section in _SECTIONS for line in _section(*section))])


def _section(title: str, options_class: type, commands: str) -> Iterator[str]:
    yield f"## {title}: `{options_class.__name__}`"
    yield ""
    yield f"Taken by {commands}."
    yield ""
    yield "| flag | environment | type | default | meaning |"
    yield "|---|---|---|---|---|"
    for flag in flags_of(options_class):
        names = ", ".join(f"`{name}`" for name in flag.declaration.split("/"))
        yield f"| {names} | `{flag.variable}` | {flag.type.__name__} | `{flag.default}` | {flag.help} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(options_page())
