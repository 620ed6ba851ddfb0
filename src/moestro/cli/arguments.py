"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A store, a checkpoint folder, a Hugging Face id, or the built-in tiny-qwen3moe-28m.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
