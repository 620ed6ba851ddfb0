"""The picture of a disk: bandwidth over block size, a line for each number of reads at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.doctor import Diagnosis

_LINES = ("#a1dab4", "#41b6c4", "#2c7fb8", "#253494")
_GREY = "#555555"


def draw_disk(found: Diagnosis, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    grid, chosen = found.disk.grid, found.profile
    for number, threads in enumerate(sorted({one.threads for one in grid})):
        line = sorted((one.block_bytes, one.bytes_per_s / 1e9) for one in grid if one.threads == threads)
        name = f"{threads} at a time" if threads > 1 else "1 read at a time"
        axes.plot(*zip(*line, strict=True), marker="o", color=_LINES[number % len(_LINES)], label=name)
    for speed, name in (
        (found.disk.small_pages_bytes_per_s, "into 4 KiB pages"),
        (found.disk.buffered_bytes_per_s, "through the page cache"),
    ):
        axes.plot([chosen.request_bytes], [speed / 1e9], "x", color=_GREY)
        axes.annotate(name, (chosen.request_bytes, speed / 1e9), (6, -3), textcoords="offset points", fontsize=8)
    axes.plot(
        [chosen.request_bytes], [chosen.bytes_per_s / 1e9], "o", ms=12, mfc="none", color="#d95f02", label="chosen"
    )
    axes.set_xscale("log", base=2)
    blocks = sorted({one.block_bytes for one in grid})
    axes.set_xticks(blocks, [format_bytes(block) for block in blocks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel("GB/s", fontsize=9)
    axes.set_title("How fast planes come from disk", loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.annotate(chosen.device, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9, color=_GREY)
    axes.grid(color="#e9e9ec")
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
