"""The `moestro` command: one module per command, which parses, calls the rooms below and draws; no logic of its own."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `moestro` script."""
    from moestro.cli.app import app

    app(prog_name="moestro")
