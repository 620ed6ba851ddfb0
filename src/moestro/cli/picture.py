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
_PALETTE = "YlGnBu"


def check_picture_path(path: Path) -> None:
    """Find out before any work whether a picture could be written. Raises RequestError."""
    if path.is_dir():
        raise RequestError(f"The picture {path} is a folder. Give the name of a .png file.")
    if path.suffix.lower() != ".png":
        raise RequestError(f"The picture {path} is no .png file. Give a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise RequestError(
            f"The folder {path.absolute().parent} of the picture {path.name} does not exist. Make it first."
        )


def draw_experts(counts_LE: npt.NDArray[np.int64], path: Path, *, model: str, tokens: int) -> None:
    """Write a heat map, one row per MoE layer and one column per expert, of the tokens routed to each.

    Args:
        counts_LE: tokens routed to each expert of each layer.
        path: the PNG to write.
        model, tokens: what ran, for the line under the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, experts = counts_LE.shape
    size = (1.6 + np.clip(experts * 0.27, 7.0, 18.0), 1.6 + np.clip(layers * 0.27, 2.0, 12.0))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(_NEVER)
    never_used_masked = np.ma.masked_equal(counts_LE, 0)
    image = axes.imshow(never_used_masked, cmap=_PALETTE, aspect="auto", interpolation="nearest", vmin=0)
    _label(axes, layers, experts)
    axes.set_title("Which experts each layer used", loc="left", fontsize=12, fontweight="bold", pad=22)
    subtitle = f"{model}, {tokens} tokens; the busiest quarter of a layer's experts took {busiest_share(counts_LE):.0%}"
    axes.annotate(subtitle, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9, color="#555555")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.set_label("tokens routed", fontsize=9)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path)


def busiest_share(counts_LE: npt.NDArray[np.int64]) -> float:
    """The part of all routed tokens that went to the busiest quarter of each layer's experts."""
    quarter = max(1, counts_LE.shape[1] // 4)
    return float(np.sort(counts_LE, axis=1)[:, -quarter:].sum() / max(1, counts_LE.sum()))


def _label(axes: Axes, layers: int, experts: int) -> None:
    axes.set_xlabel("expert (grey: never used)", fontsize=9)
    axes.set_ylabel("MoE layer", fontsize=9)
    axes.set_xticks(_ticks(experts))
    axes.set_yticks(_ticks(layers))
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    _draw_grid(axes, layers, experts)


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
