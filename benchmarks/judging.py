"""What the benchmarks of foresight share: requests to learn from and to judge on, nets, fitted choices, plots."""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.foresight import TrainingOptions, load_nets, train
from moestro.foresight.net_file import save_nets
from moestro.policy.choice import Choice, make_choice, needs_nets
from moestro.policy.observation import Shape
from moestro.policy.predictors.net import Nets
from moestro.simulate.fit import fit
from moestro.simulate.routings import gates_of
from moestro.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f5a7a", "#c8742c", "#4b8f5a", "#9a4d6f", "#8a8a92", "#c9a227")


def parser_of(description: str) -> argparse.ArgumentParser:
    """With the arguments that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--learn", type=Path, help="another trace to learn from (else: every other request)")
    parser.add_argument(
        "--nets", type=Path, help="file of the learned predictor: read, or written when it is not there"
    )
    parser.add_argument("--requests", type=int, default=0, help="the first so many of the trace (0: all)")
    parser.add_argument("--judged", type=int, default=0, help="so many of those judged, evenly spread (0: all)")
    parser.add_argument("--shown", type=int, default=0, help="so many of those learnt from go by first (0: all)")
    parser.add_argument("--shuffle", action="store_true", help="judge requests in random order, not as recorded")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=TrainingOptions.epochs)
    parser.add_argument("--width", type=int, default=TrainingOptions.width)
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    return parser


@dataclass
class Case:
    """Requests to learn from (nets are trained on `learned_from`, of which policies see `shown`) and to judge on."""

    options: argparse.Namespace
    shape: Shape
    learned_from: Trace
    shown: Trace
    judged: Trace
    _nets: tuple[Nets, Nets] | None = field(default=None, init=False)

    @property
    def nets(self) -> tuple[Nets, Nets]:
        if self._nets is None:
            self._nets = self._read_or_train()
        return self._nets

    def fitted(self, policy: str, predictor: str, *, prefetch: bool) -> Choice:
        """What has seen the requests to learn from."""
        known = self.nets if needs_nets(policy, predictor, prefetch=prefetch) else None
        choice = make_choice(policy, predictor, self.shape, prefetch=prefetch, nets=known)
        fit(choice, self.shown, gates=gates_of(choice, predictor, self.shown))
        return choice

    def save(self, result: dict[str, Any]) -> None:
        """As JSON, if asked for."""
        if self.options.out is not None:
            self.options.out.write_text(json.dumps(result, indent=1) + "\n")

    def _read_or_train(self) -> tuple[Nets, Nets]:
        path = self.options.nets
        if path is not None and path.exists():
            return load_nets(path, self.shape)
        started = time.perf_counter()
        nets = train(self.learned_from, TrainingOptions(epochs=self.options.epochs, width=self.options.width))
        print(f"trained on {self.learned_from.rows} rows in {time.perf_counter() - started:.1f} s", flush=True)
        if path is not None:
            save_nets(path, *nets)
        return nets


def case_of(options: argparse.Namespace) -> Case:
    """As the arguments say."""
    trace = Trace.load(options.trace)
    requests = np.arange(min(trace.requests, options.requests or trace.requests))
    if options.learn is None:
        learned_from, judged = trace.select(requests[::2]), trace.select(requests[1::2])
    else:
        learned_from, judged = Trace.load(options.learn), trace.select(requests)
    judged = evenly(judged, options.judged)
    if options.shuffle:
        judged = judged.select(np.random.default_rng(0).permutation(judged.requests))
    case = Case(
        options,
        Shape(trace.layers, trace.num_experts, trace.picks),
        learned_from,
        evenly(learned_from, options.shown),
        judged,
    )
    print(
        f"{case.learned_from.rows} rows to learn from, {case.shown.rows} shown, {case.judged.rows} judged", flush=True
    )
    return case


def evenly(trace: Trace, count: int) -> Trace:
    """So many requests, spread evenly over the trace (0: all)."""
    if not 0 < count < trace.requests:
        return trace
    return trace.select(np.arange(count) * trace.requests // count)


def copied(choice: Choice) -> Choice:
    """For another replay from the same state."""
    return deepcopy(choice)


def new_figure(width: float, height: float) -> Figure:
    """To be saved as SVG or PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Text stays text, and the same figures give the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moestro"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def tidy(axes: Any, title: str, across: str, up: str) -> None:
    """The look of all plots."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e9e9ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
