"""What a decoder layer costs beside its kernels and experts, per decoded token, on the native and on the general path.

    python benchmarks/layer_overhead.py [--shape qwen3-30b-a3b] [--quantised] [--layers N] [--tokens N]

The layers have the published shape but few and small experts, so that the model is small; time in experts is measured
apart. "Kernels" are matrix products and attention; everything else that a forward pass does counts as overhead, its
fixed costs (embedding, rotation, final norm) divided among the layers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_checkpoint import SHAPES, write

from moestro import _native
from moestro.config import PackOptions, RuntimeOptions
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, open_model
from moestro.store.pack import pack
from moestro.store.reader import Store

SMALL = {"intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 4096, "num_experts": 16}
PROMPT = [(7 * index) % 4000 for index in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-1b-7b")
    parser.add_argument("--quantised", action="store_true", help="8-bit matrices and 4-bit experts, not bf16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60, help="decoded tokens, of which the median counts")
    arguments = parser.parse_args()
    print(f"{arguments.shape}, {arguments.layers} layers; microseconds per layer and decoded token, median (least)")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), arguments.shape, arguments.layers, arguments.quantised)
        for native in (True, False):
            options = RuntimeOptions(memory="4GiB", context=256)
            with open_model(store, options, native=native) as opened:
                steps = list(_decode(opened, arguments.tokens))
            parts = {name: [getattr(step, name) / arguments.layers * 1e6 for step in steps] for name in Step.NAMES}
            figures = ", ".join(f"{name} {statistics.median(p):.0f} ({min(p):.0f})" for name, p in parts.items())
            print(f"{opened.runner.path:8} {figures}", flush=True)


@dataclass(frozen=True)
class Step:
    """Seconds of one forward pass."""

    NAMES = ("overhead", "kernels", "experts")
    forward: float
    kernels: float
    experts: float

    @property
    def overhead(self) -> float:
        return self.forward - self.kernels - self.experts


def make_store(folder: Path, shape: str, layers: int, quantised: bool) -> Store:
    """A random store of a published shape with few and small experts."""
    config = SHAPES[shape]
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.num_hidden_layers = layers
    write(config, folder / "checkpoint")
    options = PackOptions(levels="4", calibration=False) if quantised else PackOptions(levels="raw")
    return pack(folder / "checkpoint", folder / "store", options=options)


def _decode(opened: OpenModel, tokens: int) -> Iterator[Step]:
    runner = opened.runner
    blocks = runner.kv.allocate(blocks_for(len(PROMPT) + tokens))
    runner.forward(PackedBatch([Segment(0, PROMPT, 0, blocks, True)]))
    with _timed_kernels(opened) as kernel_seconds:
        for token in range(tokens):
            batch = PackedBatch([Segment(0, [token], len(PROMPT) + token, blocks, True)])
            kernels, experts, started = kernel_seconds(), runner.stats.experts_s, time.perf_counter()
            runner.forward(batch)
            forward = time.perf_counter() - started
            yield Step(forward, kernel_seconds() - kernels, runner.stats.experts_s - experts)


@contextmanager
def _timed_kernels(opened: OpenModel) -> Iterator[Callable[[], float]]:
    """A clock of the kernels outside experts: the decoder's own, or one around the compiled functions."""
    runner: Any = opened.runner
    if runner.native is not None:
        yield lambda: runner.native.kernel_seconds
        return
    seconds = 0.0

    def timed(function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal seconds
            started, before = time.perf_counter(), seconds
            result = function(*args)
            seconds = seconds + time.perf_counter() - started if sign > 0 else before
            return result

        return call

    saved = {name: getattr(_native, name) for name in ("linear", "packed_linear", "attention")}
    for name, function in saved.items():
        setattr(_native, name, timed(function, 1))
    runner.experts = timed(runner.experts, -1)
    try:
        yield lambda: seconds
    finally:
        for name, function in saved.items():
            setattr(_native, name, function)


if __name__ == "__main__":
    main()
