"""Gives a store the learned predictor of its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moestro.errors import TraceError
from moestro.foresight.net_file import NETS_FILE, save_nets
from moestro.foresight.train import TrainingOptions, train
from moestro.store.reader import Store
from moestro.trace.trace import Trace


def fit_store(
    folder: Path, trace: Trace, options: TrainingOptions | None = None, *, progress: Callable[[int], None]
) -> None:
    """Train on a trace of the store's model; the nets replace those that were there.

    Raises:
        TraceError: the trace is of another model's shape, or too short.
        StoreError: there is no store, or it is damaged.
    """
    store = Store.open(folder)
    check_trace(store, trace)
    save_nets(folder / NETS_FILE, *train(trace, options, progress=progress))


def check_trace(store: Store, trace: Trace) -> None:
    """Raises TraceError when the trace cannot be of the store's model."""
    most = max(layer.num_experts for layer in store.layers)
    if (trace.layers, trace.num_experts) != (len(store.layers), most):
        raise TraceError(
            f"{trace.source} is of {trace.layers} MoE layers of {trace.num_experts} experts, {store.path} has "
            f"{len(store.layers)} of {most}: give a trace of the store's own model."
        )
