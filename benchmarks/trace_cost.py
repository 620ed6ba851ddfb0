"""What recording costs a decoded token, timed inside the forward passes that it is part of; and lookups among requests.

    OMP_NUM_THREADS=1 python benchmarks/trace_cost.py [--shape olmoe-1b-7b] [--tokens N] [--repeats N]

Without a shape the built-in model decodes, with all experts in memory and with some; a shape has the published layers,
but few and small experts (see `layer_overhead.py`). A token's recording is what the runner and the recorder do for it,
in place, so with the cold caches that a step leaves; a request's end is divided among its tokens. The last lines time
the collection at the shape of Qwen3-30B-A3B (48 layers, 128 experts, 8 a token).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from layer_overhead import make_store
from random_checkpoint import SHAPES

from moestro.calibration import pack_apart
from moestro.config import RuntimeOptions
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, open_model
from moestro.store.locate import locate
from moestro.store.reader import Store
from moestro.trace import CollectionFile, EamCollection, Matcher, Recorder

MODEL = "tiny-qwen3moe-28m"
PROMPT = [(7 * index) % 4000 for index in range(64)]
LAYERS, EXPERTS, PICKS = 48, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=16, help="of the shape")
    parser.add_argument("--memory", nargs="*", default=["200MiB", "32MiB"], help="for the built-in model")
    parser.add_argument("--tokens", type=int, default=256, help="decoded tokens of a request")
    parser.add_argument("--repeats", type=int, default=15, help="requests of each kind")
    parser.add_argument("--entries", type=int, nargs="*", default=[128, 1000, 10000], help="of the collections timed")
    arguments = parser.parse_args()
    print(f"{arguments.repeats} requests of each kind, of {arguments.tokens} decoded tokens; microseconds per token")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.shape is None:
            store = Store.open(locate(MODEL, auto_pack=True, pack=pack_apart))
            for memory in arguments.memory:
                _time_decoding(store, memory, folder, arguments.tokens, arguments.repeats)
        else:
            store = make_store(folder, arguments.shape, arguments.layers, quantised=True)
            _time_decoding(store, "4GiB", folder, arguments.tokens, arguments.repeats)
    for entries in arguments.entries:
        _time_collection(entries)


def _time_decoding(store: Store, memory: str, folder: Path, tokens: int, repeats: int) -> None:
    with open_model(store, RuntimeOptions(memory=memory, context=1024, threads=1)) as opened:
        layers, experts = opened.runner.expert_counts.shape
        file = CollectionFile(folder / "requests.npz", model="benchmark", layers=layers, experts=experts)
        while len(file.decode) < file.decode.capacity:  # as full as it gets: every end replaces an entry
            for collection in file.phases.values():
                collection.insert(np.random.default_rng(len(collection)).poisson(9.0, (layers, experts)) + 1)
        kinds: dict[str, Callable[[], Recorder | None]] = {
            "off": lambda: None,
            "matrices": lambda: Recorder(experts, collections=file),
            "matrices and trace": lambda: Recorder(experts, collections=file, keep=True),
        }
        blocks = opened.runner.kv.allocate(blocks_for(len(PROMPT) + tokens))
        _decode(opened, blocks, tokens)
        print(f"{store.path.name}, {memory}, {opened.runner.path} path")
        for name, make in kinds.items():
            steps, recording = [], []
            for _ in range(repeats):
                recorder = opened.runner.recorder = make()
                clock = _Clock(opened, recorder)
                steps.append(_decode(opened, blocks, tokens))
                recording.append(clock.seconds / tokens * 1e6)
            share = statistics.median(part / whole for part, whole in zip(recording, steps, strict=True))
            whole, part = _spread(steps), _spread(recording)
            print(f"  {name:20} {whole} a token, of which recording {part}, {share:.2%}", flush=True)


class _Clock:
    """Adds up what the parts of recording take, of a request's prompt too: one forward pass among many."""

    def __init__(self, opened: OpenModel, recorder: Recorder | None) -> None:
        self.seconds = 0.0
        opened.runner.__dict__.pop("_routing", None)
        if recorder is not None:
            for owner, name in ((opened.runner, "_routing"), (recorder, "step"), (recorder, "end")):
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **settings)
            self.seconds += time.perf_counter() - started
            return result

        return call


def _decode(opened: OpenModel, blocks: list[int], tokens: int) -> float:
    """Microseconds of a forward pass of a request behind its prompt, in the mean, its end included."""
    runner = opened.runner
    runner.forward(PackedBatch([Segment(0, PROMPT, 0, blocks, True)]))
    seconds = 0.0
    for token in range(tokens):
        batch = PackedBatch([Segment(0, [token % 4000], len(PROMPT) + token, blocks, True, True)])
        started = time.perf_counter()
        runner.forward(batch)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    runner.end_request(0)
    return 1e6 * (seconds + time.perf_counter() - started) / tokens


def _time_collection(entries: int) -> None:
    rng = np.random.default_rng(0)
    popularity_LE = rng.dirichlet(np.full(EXPERTS, 0.3), size=LAYERS)
    collection = EamCollection(LAYERS, EXPERTS, capacity=entries)
    while len(collection) < entries:
        collection.insert(
            rng.poisson(400 * popularity_LE[:, rng.permutation(EXPERTS)]) + (rng.random((LAYERS, EXPERTS)) < 0.1)
        )
    matcher = Matcher(collection)
    observing, finding, summing = [], [], []
    for _ in range(30):
        for layer in range(LAYERS):
            picks = rng.choice(EXPERTS, PICKS, replace=False, p=popularity_LE[layer] * 0.9 + 0.1 / EXPERTS)
            counts_E = np.bincount(picks, minlength=EXPERTS)
            times = [time.perf_counter()]
            matcher.observe(layer, counts_E)
            times.append(time.perf_counter())
            indices, similarities = matcher.nearest(4)
            times.append(time.perf_counter())
            collection.probabilities(indices, similarities, layers=slice(layer, layer + 4))
            times.append(time.perf_counter())
            for kept, (before, after) in zip((observing, finding, summing), pairwise(times), strict=True):
                kept.append(1e6 * (after - before))
    started = time.perf_counter()
    collection.insert(collection.counts(0))
    inserting = time.perf_counter() - started
    print(
        f"{entries:6} entries ({collection.nbytes / 2**20:.0f} MiB): observe {_spread(observing)}, nearest four "
        f"{_spread(finding)}, their probabilities in four layers {_spread(summing)} microseconds; a request's end "
        f"{1e3 * inserting:.1f} ms",
        flush=True,
    )


def _spread(values: list[float]) -> str:
    """Median, and the middle half in brackets."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
