"""Time per token of policies with predictors that read ahead, over memory and links, by replay in virtual time.

    python benchmarks/foresight_time.py TRACE [--slots 8,16] [--links 2.6GB,10GB,25GB] [--judged N] [--shown N]
                                              [--combinations "lru,value>learned,..."] [--nets FILE]
                                              [--out results.json] [--plot times.svg]

A combination is a policy, or policy>predictor where the predictor reads ahead. One cache of slots x layers experts for
the whole model, an expert's three matrices of --model-shape, --compute seconds for a layer in memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from judging import COLOURS, Case, case_of, copied, new_figure, parser_of, save_figure, tidy

from moestro.config import SimulateOptions
from moestro.policy import LRU
from moestro.simulate.page_cache import replay_page_cache
from moestro.simulate.routings import gates_of
from moestro.simulate.simulation import expert_bytes_of, machine_of
from moestro.simulate.timed import Machine, TimedReplay, TimedResult

COMBINATIONS = (
    "lru,lru>ensemble,lru>learned,lrfu,lrfu>ensemble,hobbit>previous-layer,moe_infinity,moe_infinity>eamc,"
    "value,value>ensemble,value>learned"
)
BASE = "lru"
PAGE_CACHE = "page cache"


def main() -> None:
    options = arguments()
    case = case_of(options)
    slots = [int(one) for one in options.slots.split(",")]
    links = options.links.split(",")
    rows: list[dict[str, Any]] = []
    print("slots, link: milliseconds a token (share of LRU without prefetch), MB a token, recall, precision")
    for name in [PAGE_CACHE, *options.combinations.split(",")]:
        policy, _, predictor = name.partition(">")
        started = time.perf_counter()
        fitted = None if name in (PAGE_CACHE, BASE) else fitted_to(case, policy, predictor)
        for count in slots:
            for link in links:
                machine = machine_of(SimulateOptions(slots="1", disk_bw=link, compute=options.compute), case.shape)
                found = replay(case, name, predictor, fitted, count, machine)
                rows.append(row_of(name, count, link, found))
                show(rows)
        print(f"{'':24s} {time.perf_counter() - started:.0f} s", flush=True)
    case.save({"trace": options.trace.name, "judged": case.judged.rows, "compute_s": options.compute, "rows": rows})
    if options.plot is not None:
        draw(rows, options.plot)


def fitted_to(case: Case, policy: str, predictor: str) -> Any:
    """Policy `value` without a predictor to read ahead goes by the default one."""
    return case.fitted(policy, predictor or "learned", prefetch=bool(predictor))


def replay(case: Case, name: str, predictor: str, fitted: Any, slots: int, machine: Machine) -> TimedResult:
    expert_bytes = expert_bytes_of(case.options.model_shape)
    layers, concurrency = case.shape.layers, case.options.concurrency
    memory = slots * layers * expert_bytes
    if name == PAGE_CACHE:
        every = [expert_bytes] * layers
        return replay_page_cache(
            case.judged, expert_bytes=every, memory=memory, machine=machine, concurrency=concurrency
        )
    choice = None if fitted is None else copied(fitted)
    foresight = None if choice is None else choice.foresight(prefetch=bool(predictor))
    return TimedReplay(
        case.judged,
        plane_bytes=[[expert_bytes]] * layers,
        memory=memory,
        machine=machine,
        policy=LRU() if foresight is None else foresight.eviction,
        foresight=foresight,
        gates=None if choice is None else gates_of(choice, predictor, case.judged),
        concurrency=concurrency,
    ).run()


def row_of(name: str, slots: int, link: str, found: TimedResult) -> dict[str, Any]:
    tokens = found.tokens
    return {
        "name": name,
        "slots": slots,
        "link": link,
        "ms": 1e3 * found.time_per_token_s,
        "stall_ms": 1e3 * found.stats.stall_seconds / tokens,
        "demand_mb": found.carried.demand / tokens / 1e6,
        "prefetch_mb": found.carried.prefetch / tokens / 1e6,
        "wasted_mb": found.stats.wasted_bytes / tokens / 1e6,
        "recall": found.foreseen.recall,
        "precision": found.foreseen.precision,
    }


def show(rows: list[dict[str, Any]]) -> None:
    one = rows[-1]
    base = [
        each["ms"] for each in rows if (each["name"], each["slots"], each["link"]) == (BASE, one["slots"], one["link"])
    ]
    share = f"({one['ms'] / base[0]:.3f})" if base else ""
    print(
        f"{one['name']:24s} {one['slots']:3d} {one['link']:>6s}: {one['ms']:8.2f} {share:8s} "
        f"{one['demand_mb']:7.1f} + {one['prefetch_mb']:5.1f}  {one['recall']:.3f} {one['precision']:.3f}",
        flush=True,
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A chart for each amount of memory: bars by link, relative to LRU without prefetch."""
    slots = sorted({one["slots"] for one in rows})
    links = list(dict.fromkeys(one["link"] for one in rows))
    names = list(dict.fromkeys(one["name"] for one in rows))
    times = {(one["name"], one["slots"], one["link"]): one["ms"] for one in rows}
    figure = new_figure(11, 1.4 + 0.3 * len(names))
    for axes, count in zip(figure.subplots(1, len(slots), squeeze=False)[0], slots, strict=True):
        for place, link in enumerate(links):
            shares = [times[name, count, link] / times[BASE, count, link] for name in names]
            heights = [index + (place - 1) * 0.27 for index in range(len(names))]
            axes.barh(heights, shares, height=0.25, color=COLOURS[place], label=f"{link}/s")
        axes.axvline(1, color="#8a8a92", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        tidy(axes, f"{count} experts of each layer in memory", "time per token, LRU without prefetch = 1", "")
        axes.get_legend().remove()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(links), frameon=False)
    save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--slots", default="8,16")
    parser.add_argument("--links", default="2.6GB,10GB,25GB")
    parser.add_argument("--combinations", default=COMBINATIONS)
    parser.add_argument("--model-shape", default="2880x2880x4")
    parser.add_argument("--compute", type=float, default=0.001)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
