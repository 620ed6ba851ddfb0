"""`moestro simulate`: what a policy and a predictor would do with recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.console import Row, print_json, print_table
from moestro.config import SimulateOptions
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.simulate.simulation import Simulated
    from moestro.simulate.timed import TimedResult


def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Recorded routing (npz, see `moestro trace`) of one model.")],
    options: SimulateOptions,
    as_json: AsJson = False,
) -> None:
    """Replay recorded routing: hit rates against LRU and Belady's optimum, bytes, stalls and time per token."""
    from moestro.simulate.simulation import simulate as simulate_trace
    from moestro.trace import Trace
    from moestro.trace.join import join

    trace = join([Trace.load(path) for path in traces])
    result = simulate_trace(trace, options, progress=lambda what: say("simulating", what))
    if as_json:
        print_json(_json(result))
    else:
        _draw(", ".join(map(str, traces)), options, result)


def _json(result: Simulated) -> dict[str, object]:
    return {
        "slots": result.slots,
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
    }


def _bytes(timed: TimedResult) -> dict[str, int]:
    return {
        "demand": timed.carried.demand,
        "prefetch": timed.carried.prefetch,
        "wasted": timed.stats.wasted_bytes,
    }


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
        ("time per token", _ms(timed.time_per_token_s), f"LRU without prefetch {_ms(lru.time_per_token_s)}"),
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


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
