"""The picture of a trace: which experts each layer used, over all requests and by each of some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from moestro.trace import Trace

_NEVER = "#e9e9ec"
_PALETTE = "YlGnBu"
_COLUMNS = 4
_GREY = "#555555"


def draw_trace(trace: Trace, path: Path, *, requests: Sequence[int]) -> None:
    """Write a PNG of heat maps [layer, expert], all requests at the top and those of `requests` below, four a line.

    Colours are shares of the tokens, each map up to its own largest, so that short and long requests compare.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moestro.trace.eam import eam_of_rows

    lines = -(-len(requests) // _COLUMNS)
    figure = Figure(figsize=(14, 4.2 + 2.1 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 + lines, _COLUMNS)
    whole = figure.add_subplot(grid[:2, :])
    shares_LE = eam_of_rows(trace.experts_NLK, trace.num_experts) / trace.rows
    image = _map(whole, shares_LE, f"All {trace.requests} requests, {trace.rows} tokens")
    whole.set_xlabel("expert (grey: never used)", fontsize=9)
    whole.set_ylabel("MoE layer", fontsize=9)
    bar = figure.colorbar(image, ax=whole, pad=0.01, fraction=0.03)
    bar.set_label("share of tokens", fontsize=9)
    bar.ax.tick_params(length=0, labelsize=8)
    for place, request in enumerate(requests):
        axes = figure.add_subplot(grid[2 + place // _COLUMNS, place % _COLUMNS])
        rows = trace.rows_of(request)
        name = Path(str(trace.meta[request].get("dataset", ""))).name
        tokens = rows.stop - rows.start
        shares_LE = eam_of_rows(trace.experts_NLK[rows], trace.num_experts) / tokens
        _map(axes, shares_LE, f"{request}: {tokens} tokens  {name}")
    figure.savefig(path)


def _map(axes: Axes, shares_LE: np.ndarray, title: str) -> AxesImage:
    axes.set_facecolor(_NEVER)
    image = axes.imshow(np.ma.masked_equal(shares_LE, 0), cmap=_PALETTE, aspect="auto", interpolation="nearest", vmin=0)
    axes.set_title(title, loc="left", fontsize=8, color=_GREY)
    axes.tick_params(length=0, labelsize=7)
    for side in axes.spines.values():
        side.set_visible(False)
    return image
