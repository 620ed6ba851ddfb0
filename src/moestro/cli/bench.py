"""`moestro bench`: how fast a model is under a number of bytes, and how fast it could be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from moestro.cli.arguments import AsJson, Model
from moestro.cli.boundary import say
from moestro.cli.console import print_json, print_table
from moestro.cli.opening import locate_store, split_model
from moestro.cli.options import Only
from moestro.cli.report import share
from moestro.config import BenchOptions, RuntimeOptions
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.engine.bench import BenchProgress, BenchResult, Phase

_OPENING = Only(
    *(
        "memory",
        "context",
        "threads",
        "level",
        "quality",
        "level_policy",
        "policy",
        "predictor",
        "prefetch",
        "variant",
        "auto_pack",
    )
)


def bench(
    model: Model,
    options: Annotated[RuntimeOptions, _OPENING],
    what: BenchOptions,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decoding, beside what disk, memory and processor allow for the bytes that were moved."""
    from moestro.engine.bench import bench as measure

    name, options = split_model(model, options)
    store = locate_store(name, auto_pack=options.auto_pack)
    if what.replay_routing:
        say("note", f"Routing is replayed from {what.replay_routing}: speeds are real, tokens are not.")
    result = measure(store, options=options, what=what, progress=_say)
    if as_json:
        print_json(_to_json(model, what, result))
    else:
        _draw(model, what, result)


def _say(now: BenchProgress) -> None:
    say("measuring", f"{now.done} of {now.total} runs")


def _to_json(model: str, what: BenchOptions, result: BenchResult) -> dict[str, Any]:
    """Keys, once published, stay."""
    decode, prefill, stats = result.decode, result.prefill, result.stats
    return {
        "model": model,
        **asdict(what),
        "decode_tokens_per_s": asdict(decode.tokens_per_s),
        "prefill_tokens_per_s": asdict(prefill.tokens_per_s),
        "roofline_decode_tokens_per_s": decode.roofline_tokens_per_s,
        "roofline_prefill_tokens_per_s": prefill.roofline_tokens_per_s,
        "decode": _phase(decode),
        "prefill": _phase(prefill),
        "machine": asdict(result.machine),
        "threads": result.threads,
        "load_s": result.load_s,
        "dense_bytes_per_step": result.dense_bytes_per_step,
        **asdict(stats),
        "peak_rss_bytes": result.peak_rss_bytes,
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {**asdict(phase), "bound": {**asdict(phase.bound), "by": phase.bound.by}}


def _draw(model: str, what: BenchOptions, result: BenchResult) -> None:
    stats, machine = result.stats, result.machine
    print_table(
        f"{model}: {what.concurrency} request(s) of {what.prompt_tokens} + {what.gen_tokens} tokens, "
        f"{what.repeat} run(s){', cold' if what.cold else ''}",
        [
            ("decode", *_rate(result.decode)),
            ("  at best", *_best(result.decode)),
            ("prefill", *_rate(result.prefill)),
            ("  at best", *_best(result.prefill)),
        ],
    )
    for name, phase in (("decoding", result.decode), ("prefill", result.prefill)):
        used = phase.hits + phase.misses
        print_table(
            f"{name}, for each token",
            [
                ("experts in memory", share(phase.hits, used), f"{phase.hits} of {used}"),
                ("read from disk", format_bytes(round(phase.bytes_read_per_token)), _wasted(phase)),
                ("read from memory", format_bytes(round(phase.memory_bytes_per_token)), "dense weights, experts, KV"),
                ("waiting for the disk", f"{phase.stall_share:.1%}", "of the time"),
            ],
        )
    print_table(
        "the machine in this run",
        [
            ("disk", f"{machine.disk_bandwidth / 1e9:.2f} GB/s", "whole experts in random order, direct reads"),
            ("memory", f"{machine.memory_bandwidth / 1e9:.1f} GB/s", f"plain reading, {result.threads} threads"),
            ("compute", f"{machine.multiplications_per_s / 1e9:.0f} GMAC/s", "the store's experts, 128 rows"),
            ("memory given", format_bytes(stats.memory_bytes), f"of {format_bytes(stats.model_bytes)}"),
            ("peak resident", format_bytes(result.peak_rss_bytes), f"floor {format_bytes(stats.process_floor_bytes)}"),
            ("path", stats.path, f"level {stats.level}, policy {_by(stats.policy, stats.predictor, stats.ahead)}"),
        ],
    )


def _rate(phase: Phase) -> tuple[str, str]:
    rate = phase.tokens_per_s
    return f"{rate.median:.2f} tokens/s", f"{rate.min:.2f} to {rate.max:.2f}"


def _best(phase: Phase) -> tuple[str, str]:
    bound = phase.bound
    parts = f"disk {1e3 * bound.disk_s:.2f} ms, memory {1e3 * bound.memory_s:.2f}, compute {1e3 * bound.compute_s:.2f}"
    times = phase.roofline_tokens_per_s / phase.tokens_per_s.median
    return f"{phase.roofline_tokens_per_s:.2f} tokens/s", f"{times:.2f} times that, by {bound.by}: {parts}, at once"


def _wasted(phase: Phase) -> str:
    return f"{share(phase.wasted_bytes, phase.bytes_read)} of it ahead for nothing" if phase.wasted_bytes else ""


def _by(policy: str, predictor: str, ahead: str) -> str:
    """How experts are kept and read ahead."""
    return f"{policy} by {predictor or 'counts'}, read ahead by {ahead or 'nothing'}"
