"""`moestro pack`: make a store from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.console import Row, print_table, progress_bar
from moestro.config import PackOptions
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.store.manifest import Manifest


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
        *_quality_rows(packed.manifest),
        ("time", f"{time.monotonic() - started:.1f} s"),
    ]
    print_table("packed", rows)


def _quality_rows(manifest: Manifest) -> list[Row]:
    """How the codes were found, and the mean error of each level."""
    facts = manifest.calibration
    if facts is None:
        return [("levels", f"{manifest.encoding}, as in the checkpoint")]
    rows: list[Row] = [("levels", f"{manifest.encoding}, exact at {manifest.exact_level} bits")]
    every = [errors for experts in facts.errors for errors in experts]
    for index, level in enumerate(manifest.levels):
        mean = sum(errors[index] for errors in every) / len(every)
        rows.append((f"  {level} bits", f"mean relative squared error of an expert {mean:.2g}"))
    text = f"{facts.tokens} tokens of {facts.text.name}" if facts.text else "none: codes from the weights alone"
    remark = f"{len(facts.unrouted)} experts got none of them" if facts.unrouted else ""
    return [*rows, ("calibration", text, remark), *(("warning", warning) for warning in facts.warnings)]
