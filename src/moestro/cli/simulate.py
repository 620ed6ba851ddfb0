"""`moestro simulate`: what a policy and a predictor would do with recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.console import Row, print_json, print_table
from moestro.cli.picture import check_picture_path
from moestro.cli.simulate_picture import draw_sweep
from moestro.config import SimulateOptions
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.simulate.simulation import Simulated
    from moestro.simulate.timed import TimedResult


def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Recorded routing (npz, see `moestro trace`) of one model.")],
    options: SimulateOptions,
    plot: Annotated[
        Path | None, typer.Option(help="Write a .png of hit rates and time per token over memory, for a sweep.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded routing: hit rates against LRU and Belady's optimum, bytes, stalls and time per token."""
    if plot is not None:
        check_picture_path(plot)
    from moestro.simulate.simulation import simulate as simulate_trace
    from moestro.trace import Trace
    from moestro.trace.join import join

    trace = join([Trace.load(path) for path in traces])
    name = ", ".join(map(str, traces))
    results = simulate_trace(trace, options, progress=lambda what: say("simulating", what))
    if plot is not None:
        draw_sweep(results, plot, policy=_named(options), trace=name)
    if as_json:
        print_json(_json(results[0]) if len(results) == 1 else {"sizes": [_json(one) for one in results]})
    elif len(results) == 1:
        _draw(name, options, results[0])
    else:
        _draw_sweep(name, options, results)


def _json(result: Simulated) -> dict[str, object]:
    return {
        "slots": result.slots,
        "memory": result.memory,
        "accesses": result.accesses,
        "hit_rate": result.hit_rate,
        "lru_hit_rate": result.lru_hit_rate,
        "belady_hit_rate": result.belady_hit_rate,
        "gap_closed": result.gap_closed,
        "prefetch_recall": result.timed.foreseen.recall,
        "prefetch_precision": result.timed.foreseen.precision,
        "tokens": result.timed.tokens,
        "bytes": _bytes(result.timed),
        "stall_seconds": result.timed.stats.stall_seconds,
        "time_per_token_s": result.timed.time_per_token_s,
        "lru_bytes": _bytes(result.lru),
        "lru_time_per_token_s": result.lru.time_per_token_s,
        "page_cache_bytes": _bytes(result.page_cache),
        "page_cache_time_per_token_s": result.page_cache.time_per_token_s,
    }


def _bytes(timed: TimedResult) -> dict[str, int]:
    return {
        "demand": timed.carried.demand,
        "prefetch": timed.carried.prefetch,
        "wasted": timed.stats.wasted_bytes,
    }


def _named(options: SimulateOptions) -> str:
    """The contender."""
    ahead = f" with {options.predictor} prefetch" if options.prefetch == "on" else ""
    return f"{options.policy}{ahead}"


def _draw_sweep(name: str, options: SimulateOptions, results: Sequence[Simulated]) -> None:
    rates: list[Row] = [
        (
            f"{one.slots} ({format_bytes(one.memory)})",
            f"{one.hit_rate:.4f}",
            f"LRU {one.lru_hit_rate:.4f}, Belady {one.belady_hit_rate:.4f}: {100 * one.gap_closed:.1f}% of the way",
        )
        for one in results
    ]
    print_table(f"{name}: hit rate of {options.policy} by experts of each layer", rates)
    times: list[Row] = [
        (
            format_bytes(one.memory),
            _ms(one.timed.time_per_token_s),
            _others(one),
        )
        for one in results
    ]
    print_table(f"one cache for all layers: time per token of {_named(options)}", times)


def _draw(name: str, options: SimulateOptions, result: Simulated) -> None:
    rates: list[Row] = [
        (options.policy, f"{result.hit_rate:.4f}", f"{100 * result.gap_closed:.1f}% of the way from LRU to Belady"),
        ("LRU", f"{result.lru_hit_rate:.4f}"),
        ("Belady", f"{result.belady_hit_rate:.4f}", "the most that is possible"),
    ]
    print_table(f"{name}: hits of {result.accesses} accesses with {result.slots} experts of each layer", rates)
    timed, lru = result.timed, result.lru
    tokens = max(timed.tokens, 1)

    def each(nbytes: int) -> str:
        return format_bytes(nbytes // tokens)

    times: list[Row] = [
        ("time per token", _ms(timed.time_per_token_s), _others(result)),
        ("of it waiting", _ms(timed.stats.stall_seconds / tokens)),
        ("asked for", each(timed.carried.demand), f"a token; LRU {each(lru.carried.demand)}"),
        ("read ahead", each(timed.carried.prefetch), "a token"),
        ("wasted", each(timed.stats.wasted_bytes), "a token, read ahead and never used"),
    ]
    if options.prefetch == "on":
        foreseen = timed.foreseen
        times += [
            ("recall", f"{foreseen.recall:.3f}", "of the absent experts that were needed, read ahead"),
            ("precision", f"{foreseen.precision:.3f}", "of those read ahead, needed at once"),
        ]
    print_table("one cache for all layers", times)


def _others(result: Simulated) -> str:
    page_cache_s = result.page_cache.time_per_token_s
    return f"LRU without prefetch {_ms(result.lru.time_per_token_s)}, page cache {_ms(page_cache_s)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
