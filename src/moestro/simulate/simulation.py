"""All that a simulation says of a policy: hit rates by the yardstick; time, bytes and stalls of a timed replay."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.config import SimulateOptions
from moestro.errors import TraceError
from moestro.foresight import NETS_FILE, check_trace, load_nets, train
from moestro.memory.budget import parse_bytes
from moestro.memory.pages import PAGE, round_up
from moestro.policy import LRU
from moestro.policy.choice import Choice, check_names, make_choice, needs_nets
from moestro.policy.observation import Shape
from moestro.policy.predictors.net import Nets
from moestro.simulate.fit import fit
from moestro.simulate.page_cache import replay_page_cache
from moestro.simulate.routings import gates_of
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import Machine, TimedReplay, TimedResult
from moestro.trace.trace import Trace

_EXPERTS_SHARE = 0.6
"""Of the time that a layer takes for a token, what goes into its experts (13 of 21 ms at OLMoE's shape)."""

_LATENCY_S = 1e-4
"""Of a direct read, measured."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Simulated:
    """`hit_rate` and its neighbours: prefetch off, `slots` in every layer. `timed`, what was asked for, `lru` (without
    prefetch) and `page_cache` (a mapped file): one cache of `memory` bytes for all layers, over a link."""

    slots: int
    memory: int
    accesses: int
    hit_rate: float
    lru_hit_rate: float
    belady_hit_rate: float
    timed: TimedResult
    lru: TimedResult
    page_cache: TimedResult

    @property
    def gap_closed(self) -> float:
        """Share of the way from LRU to Belady."""
        return (self.hit_rate - self.lru_hit_rate) / max(self.belady_hit_rate - self.lru_hit_rate, 1e-12)


def simulate(
    trace: Trace, options: SimulateOptions, *, progress: Progress = lambda _what: None
) -> tuple[Simulated, ...]:
    """Replay a trace as the options say, with each amount of memory.

    Raises:
        TraceError: the trace does not fit the store, or is too short, or lacks the lookahead that is needed; the memory
            does not hold what a pass needs.
        RequestError: there is no such policy or predictor.
        BudgetError: a size cannot be parsed.
    """
    check_names(options.policy, options.predictor)
    shape = Shape(trace.layers, trace.num_experts, trace.picks)
    machine = machine_of(options, shape)
    plane_bytes = _plane_bytes(options, trace)
    expert_bytes = [sum(layer) for layer in plane_bytes]
    sizes = _sizes(options, sum(expert_bytes), shape)
    fitted_to, judged = _halves(trace, options)
    fitted = _fitted(options, shape, fitted_to, judged, progress)
    progress("hit rates")
    slots = [one for one, _ in sizes]
    contender = deepcopy(fitted)
    replay = SlotReplay(judged, concurrency=options.concurrency)
    lru, belady = replay.lru(slots), replay.belady(slots)
    found = replay.run(contender.policy, slots, gates=gates_of(contender, options.predictor, judged))
    judged = _some_requests(judged, options.timed_tokens)

    def timed(memory: int, contender: Choice | None) -> TimedResult:
        foresight = None if contender is None else contender.foresight(prefetch=options.prefetch == "on")
        return TimedReplay(
            judged,
            plane_bytes=plane_bytes,
            memory=memory,
            machine=machine,
            policy=LRU() if foresight is None else foresight.eviction,
            foresight=foresight,
            gates=None if contender is None else gates_of(contender, options.predictor, judged),
            concurrency=options.concurrency,
        ).run()

    results = []
    for index, (count, memory) in enumerate(sizes):
        progress(f"time per token, memory {index + 1} of {len(sizes)}")
        results.append(
            Simulated(
                slots=count,
                memory=memory,
                accesses=lru[index].accesses,
                hit_rate=found[index].hit_rate,
                lru_hit_rate=lru[index].hit_rate,
                belady_hit_rate=belady[index].hit_rate,
                timed=timed(memory, deepcopy(fitted)),
                lru=timed(memory, None),
                page_cache=replay_page_cache(
                    judged, expert_bytes=expert_bytes, memory=memory, machine=machine, concurrency=options.concurrency
                ),
            )
        )
    return tuple(results)


def _sizes(options: SimulateOptions, slot_bytes: int, shape: Shape) -> list[tuple[int, int]]:
    """(slots of each layer, bytes); `slot_bytes` are those of one expert of each layer."""
    if options.slots:
        sizes = [(int(one), int(one) * slot_bytes) for one in options.slots.split(",")]
    else:
        sizes = [(parse_bytes(one) // slot_bytes, parse_bytes(one)) for one in options.memory.split(",")]
    for slots, memory in sizes:
        if slots < shape.picks:
            raise TraceError(
                f"{memory} bytes hold {slots} experts of each layer, a token needs {shape.picks}: give more of either."
            )
    return sizes


def _fitted(
    options: SimulateOptions, shape: Shape, fitted_to: Trace | None, judged: Trace, progress: Progress
) -> Choice:
    """The policy and predictor asked for, having seen the requests that are not judged."""
    prefetch = options.prefetch == "on"
    nets = None
    if needs_nets(options.policy, options.predictor, prefetch=prefetch):
        nets = _nets(options, shape, fitted_to, progress)
    choice = make_choice(options.policy, options.predictor, shape, prefetch=prefetch, nets=nets)
    gates = gates_of(choice, options.predictor, judged)
    if fitted_to is not None:
        progress("learning from the other requests")
        fit(choice, fitted_to, gates=gates)
    return choice


def _some_requests(trace: Trace, tokens: int) -> Trace:
    """About as many tokens (0: all), in requests spread evenly over the trace."""
    if not 0 < tokens < trace.rows:
        return trace
    count = max(1, round(trace.requests * tokens / trace.rows))
    return trace.select(np.arange(count) * trace.requests // count)


def _halves(trace: Trace, options: SimulateOptions) -> tuple[Trace | None, Trace]:
    """(what to learn from, what to judge on)"""
    if options.fit == "none":
        return None, trace
    if trace.requests < 2:
        raise TraceError(f"The trace has {trace.requests} request, so no half to learn from: give --fit none.")
    requests = np.arange(trace.requests)
    return trace.select(requests[::2]), trace.select(requests[1::2])


def _nets(
    options: SimulateOptions, shape: Shape, fitted_to: Trace | None, progress: Progress
) -> tuple[Nets, Nets] | None:
    if options.store and (Path(options.store) / NETS_FILE).exists():
        return load_nets(Path(options.store) / NETS_FILE, shape)
    if fitted_to is None:
        return None
    return train(fitted_to, progress=lambda layers: progress(f"training, layer {layers} of {shape.layers}"))


def machine_of(options: SimulateOptions, shape: Shape) -> Machine:
    """How long things take, as the options say."""
    return Machine(
        bytes_per_s=parse_bytes(options.disk_bw),
        latency_s=_LATENCY_S,
        device_bytes_per_s=parse_bytes(options.link_bw) if options.link_bw else 0.0,
        layer_s=(1 - _EXPERTS_SHARE) * options.compute,
        expert_s=_EXPERTS_SHARE * options.compute / shape.picks,
    )


def _plane_bytes(options: SimulateOptions, trace: Trace) -> list[list[int]]:
    """Of each layer, the sizes of what an expert is read in: all at once, as where every request is exact."""
    if not options.store:
        return [[expert_bytes_of(options.model_shape)]] * trace.layers
    from moestro.runtime.open import layouts_of
    from moestro.store.reader import Store

    store = Store.open(Path(options.store))
    check_trace(store, trace)
    return [[sum(plane.nbytes for plane in layout.planes)] for layout in layouts_of(store, 0)]


def expert_bytes_of(model_shape: str) -> int:
    """Of three matrices, hidden width x expert width x bits, with 16-bit scale and offset for groups of 128."""
    parts = model_shape.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise TraceError(
            f"model_shape is {model_shape!r}, expected hidden width x expert width x bits, such as 2880x2880x4."
        )
    hidden, width, bits = map(int, parts)
    return round_up(3 * hidden * width * (4 * bits + 1) // 32, PAGE)
