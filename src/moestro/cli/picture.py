"""The picture of which experts each layer used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moestro.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEVER = "#e9e9ec"
_PALETTE = "viridis_r"


def check_picture_path(path: Path) -> None:
    """Find out before any work whether a picture could be written. Raises RequestError."""
    if path.suffix.lower() != ".png":
        raise RequestError(f"The picture {path} is no .png file. Give a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise RequestError(
            f"The folder {path.absolute().parent} of the picture {path.name} does not exist. Make it first."
        )


def draw_experts(counts_LE: npt.NDArray[np.int64], path: Path, *, title: str, subtitle: str) -> None:
    """Write a heat map, one row per MoE layer and one column per expert, of the tokens routed to each.

    Args:
        counts_LE: tokens routed to each expert of each layer so far.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, experts = counts_LE.shape
    width = float(np.clip(experts * 0.27, 7.0, 18.0))
    height = float(np.clip(layers * 0.27, 2.0, 12.0))
    figure = Figure(figsize=(width + 1.6, height + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = np.ma.masked_equal(counts_LE, 0)
    image = axes.imshow(shown, cmap=_PALETTE, aspect="auto", interpolation="nearest", vmin=0)
    axes.set_facecolor(_NEVER)
    axes.set_xlabel("expert (grey: never used)")
    axes.set_ylabel("MoE layer")
    axes.set_xticks(_ticks(experts))
    axes.set_yticks(_ticks(layers))
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    _draw_grid(axes, layers, experts)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.set_label("tokens routed")
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes.set_title(subtitle, fontsize=9, loc="left", color="#555555")
    figure.savefig(path)


def _ticks(count: int) -> list[int]:
    """At most some 32 labels, evenly spaced."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count <= 32 * step)
    return list(range(0, count, step))


def _draw_grid(axes: Axes, layers: int, experts: int) -> None:
    """Thin white lines between cells, where cells are large enough for lines."""
    if layers > 64 or experts > 64:
        return
    axes.set_xticks(np.arange(-0.5, experts), minor=True)
    axes.set_yticks(np.arange(-0.5, layers), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
