"""What recording costs: time in the recorder against forward passes of the same run; and lookups among past requests.

    OMP_NUM_THREADS=1 python benchmarks/trace_cost.py [--tokens N] [--repeats N]

Decoding is one request at a time with all experts in memory, which is when a token is quickest and recording weighs
most. Both are processor time of one thread, which other work on the machine hardly changes. The last lines time the collection at the shape of Qwen3-30B-A3B (48 layers, 128 experts, 8 a token).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moestro.calibration import pack_apart
from moestro.config import RuntimeOptions
from moestro.policy.observation import RequestRows
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, open_model
from moestro.store.locate import locate
from moestro.store.reader import Store
from moestro.trace import CollectionFile, EamCollection, Matcher, Recorder, StepRouting

MODEL = "tiny-qwen3moe-28m"
PROMPT = [(7 * index) % 4000 for index in range(64)]
LAYERS, EXPERTS, PICKS = 48, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400, help="decoded tokens of a request")
    parser.add_argument("--repeats", type=int, default=7, help="requests of each kind")
    parser.add_argument("--entries", type=int, nargs="*", default=[128, 1000, 10000], help="of the collections timed")
    arguments = parser.parse_args()
    store = Store.open(locate(MODEL, auto_pack=True, pack=pack_apart))
    with (
        open_model(store, RuntimeOptions(memory="200MiB", context=1024, threads=1)) as opened,
        tempfile.TemporaryDirectory() as folder,
    ):
        _time_decoding(opened, store, Path(folder), arguments.tokens, arguments.repeats)
    for entries in arguments.entries:
        _time_collection(entries)


class TimedRecorder(Recorder):
    """A recorder that knows how long it took."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.seconds = 0.0

    def step(self, requests: Sequence[RequestRows], tokens_T: np.ndarray, routing: StepRouting) -> None:
        started = time.thread_time()
        super().step(requests, tokens_T, routing)
        self.seconds += time.thread_time() - started

    def end(self, request: int) -> None:
        started = time.thread_time()
        super().end(request)
        self.seconds += time.thread_time() - started


def _time_decoding(opened: OpenModel, store: Store, folder: Path, tokens: int, repeats: int) -> None:
    layers, experts = opened.runner.expert_counts.shape
    file = CollectionFile(folder / "requests.npz", model="benchmark", layers=layers, experts=experts)
    while len(file.decode) < file.decode.capacity:  # as full as it gets, so that every end replaces an entry
        for collection in (file.prefill, file.decode):
            collection.insert(np.random.default_rng(len(file.decode)).poisson(9.0, (layers, experts)) + 1)
    kinds: dict[str, Callable[[], TimedRecorder | None]] = {
        "off": lambda: None,
        "matrices": lambda: TimedRecorder(experts, collections=file),
        "matrices and trace": lambda: TimedRecorder(experts, collections=file, keep=True),
    }
    forward: dict[str, list[float]] = {name: [] for name in kinds}
    inside: dict[str, list[float]] = {name: [] for name in kinds}
    blocks = opened.runner.kv.allocate(blocks_for(len(PROMPT) + tokens))
    _decode(opened, blocks, tokens)
    for _ in range(repeats):
        for name, make in kinds.items():
            recorder = opened.runner.recorder = make()
            seconds = _decode(opened, blocks, tokens)
            opened.runner.recorder = None
            forward[name].append(seconds / tokens * 1e6)
            inside[name].append(0.0 if recorder is None else recorder.seconds / tokens * 1e6)
    print(f"{store.path.name}, {opened.runner.path} path, {tokens} decoded tokens a request; microseconds per token")
    for name in kinds:
        share = statistics.median(part / whole for part, whole in zip(inside[name], forward[name], strict=True))
        print(
            f"{name:20} {_spread(forward[name])} a token, of which recording {_spread(inside[name])}, {share:.2%}",
            flush=True,
        )


def _decode(opened: OpenModel, blocks: list[int], tokens: int) -> float:
    """Seconds of decoding a request, its end included."""
    runner = opened.runner
    runner.forward(PackedBatch([Segment(0, PROMPT, 0, blocks, True)]))
    if isinstance(runner.recorder, TimedRecorder):
        runner.recorder.seconds = 0.0
    started = time.thread_time()
    for token in range(tokens):
        runner.forward(PackedBatch([Segment(0, [token % 4000], len(PROMPT) + token, blocks, True, True)]))
    runner.end_request(0)
    return time.thread_time() - started


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
    """Median, and the least in brackets."""
    return f"{statistics.median(values):.1f} ({min(values):.1f})"


if __name__ == "__main__":
    main()
