"""The picture of a sweep: hit rate and time per token over memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moestro.simulate.simulation import Simulated

_OURS, _LRU, _BOUND, _PAGES = "#1f5a7a", "#c8742c", "#8a8a92", "#9a4d6f"


def draw_sweep(results: Sequence[Simulated], path: Path, *, policy: str, trace: str) -> None:
    """Write a PNG of two charts; `policy` and `trace` say what was simulated."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = sorted(results, key=lambda one: one.memory)
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    rates, times = figure.subplots(1, 2)
    _line(rates, results, [one.belady_hit_rate for one in results], "Belady", _BOUND)
    _line(rates, results, [one.hit_rate for one in results], policy.split(" ")[0], _OURS)
    _line(rates, results, [one.lru_hit_rate for one in results], "LRU", _LRU)
    _label(rates, results, "hit rate, equal slots in each layer, no prefetch")
    rates.set_ylim(top=1.0)
    _line(times, results, [1e3 * one.page_cache.time_per_token_s for one in results], "page cache", _PAGES)
    _line(times, results, [1e3 * one.lru.time_per_token_s for one in results], "LRU without prefetch", _LRU)
    _line(times, results, [1e3 * one.timed.time_per_token_s for one in results], policy, _OURS)
    _label(times, results, "milliseconds a token, one cache for all layers")
    times.set_ylim(bottom=0)
    figure.suptitle(trace, x=0.01, ha="left", fontsize=10)
    figure.savefig(path)


def _line(axes: Axes, results: Sequence[Simulated], values: Sequence[float], label: str, colour: str) -> None:
    axes.plot([one.slots for one in results], values, marker="o", markersize=4, color=colour, label=label)


def _label(axes: Axes, results: Sequence[Simulated], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("experts of each layer in memory", fontsize=9)
    axes.set_xticks(
        [one.slots for one in results], [f"{one.slots}\n{format_bytes(one.memory)}" for one in results], fontsize=8
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(color="#e9e9ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
