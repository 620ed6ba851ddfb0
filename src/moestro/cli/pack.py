"""`moestro pack`: make a store from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.console import Row, print_table, progress_bar
from moestro.cli.report import quality_rows
from moestro.config import PackOptions
from moestro.memory.budget import format_bytes


def pack(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a Hugging Face id, or the built-in model.")],
    store: Annotated[Path, typer.Argument(help="The folder to make. After an interruption the same command goes on.")],
    options: PackOptions,
) -> None:
    """Make a store from a checkpoint, one expert at a time; it can be interrupted and goes on where it was."""
    from moestro.calibration import pack as pack_store
    from moestro.store.locate import locate_source

    started = time.monotonic()
    with progress_bar("packing") as report:
        packed = pack_store(
            locate_source(source),
            store,
            options=options,
            progress=lambda step: report(step.done_bytes, step.total_bytes),
        )
    experts = sum(layer.num_experts for layer in packed.layers)
    rows: list[Row] = [
        ("store", str(packed.path)),
        ("experts", f"{experts} in {len(packed.layers)} layers", format_bytes(packed.expert_bytes)),
        ("dense weights", format_bytes(packed.dense_bytes)),
        *quality_rows(packed.manifest),
        ("time", f"{time.monotonic() - started:.1f} s"),
    ]
    print_table("packed", rows)
