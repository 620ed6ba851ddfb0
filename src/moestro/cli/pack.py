"""`moestro pack`: make a store from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.console import Row, pack_bar, print_table
from moestro.cli.report import quality_rows
from moestro.config import PackOptions
from moestro.errors import PackError
from moestro.memory.budget import format_bytes


def pack(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a Hugging Face id, or the built-in model; a config with --random."),
    ],
    store: Annotated[Path, typer.Argument(help="The folder to make. After an interruption the same command goes on.")],
    options: PackOptions,
    random: Annotated[
        bool, typer.Option("--random", help="Draw random weights; SOURCE need be no more than a config.json.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
) -> None:
    """Make a store from a checkpoint, one expert at a time; it can be interrupted and goes on where it was."""
    from moestro.calibration import pack as pack_store
    from moestro.store.locate import locate_source
    from moestro.store.random_pack import pack_random

    if seed and not random:
        raise PackError("--seed is for --random: weights of a checkpoint are not drawn. Leave it out.")
    started = time.monotonic()
    with pack_bar("packing") as report:
        if random:
            packed = pack_random(source, store, options=options, seed=seed, progress=report)
        else:
            packed = pack_store(locate_source(source), store, options=options, progress=report)
    experts = sum(layer.num_experts for layer in packed.layers)
    rows: list[Row] = [
        ("store", str(packed.path)),
        ("experts", f"{experts} in {len(packed.layers)} layers", format_bytes(packed.expert_bytes)),
        ("dense weights", format_bytes(packed.dense_bytes)),
        *quality_rows(packed.manifest),
        ("time", f"{time.monotonic() - started:.1f} s"),
    ]
    print_table("packed", rows)
