"""What a run did, in words and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moestro.cli.console import Row
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro import Completion, Stats
    from moestro.store.manifest import Manifest


_NEVER_ASKED = ("logprobs", "routed_experts", "cached_tokens")
"""What one prompt without a flag for it cannot have."""


def to_json(completion: Completion, stats: Stats) -> dict[str, Any]:
    """The object of `generate --json`. Keys, once published, stay."""
    known = {name: value for name, value in asdict(completion).items() if name not in _NEVER_ASKED}
    if completion.choice is None:
        del known["choice"]
    return {**known, "stats": asdict(stats)}


def summary(completion: Completion, stats: Stats) -> str:
    """Two lines for standard error, a third where experts were read ahead."""
    timings = completion.timings
    used = stats.hits + stats.misses
    return (
        f"{len(completion.token_ids)} tokens ({completion.finish_reason}), "
        f"{timings.decode_tokens_per_s:.1f} tokens/s, first after {timings.ttft_s:.2f} s, "
        f"prompt of {completion.prompt_tokens} at {timings.prefill_tokens_per_s:.1f} tokens/s, "
        f"opened in {timings.load_s:.1f} s\n"
        f"{format_bytes(stats.memory_bytes)} given of {format_bytes(stats.model_bytes)} at level {stats.level}, "
        f"peak resident {format_bytes(stats.peak_rss_bytes)} with a process floor of "
        f"{format_bytes(stats.process_floor_bytes)}; experts {share(stats.hits, used)} hits, "
        f"{format_bytes(stats.bytes_read)} read, waited {stats.stall_s:.2f} s for the disk"
        + _chosen(completion)
        + "".join(f"\n{name}: {', '.join(facts)}" for name, *facts in ahead_rows(stats))
    )


def _variants(stats: Stats) -> list[Row]:
    if not stats.variants:
        return []
    return [("  variants", format_bytes(sum(stats.variants.values())), ", ".join(stats.variants))]


def _chosen(completion: Completion) -> str:
    """Who answered, where that was left to the router of domains."""
    choice = completion.choice
    if choice is None:
        return ""
    extra = f", {choice.tokens} tokens under the base to tell" if choice.tokens else ""
    who = choice.variant or "the base"
    return f"\nanswered by {who}: likeliest for {choice.domain} ({choice.confidence:.0%}){extra}"


def memory_rows(stats: Stats) -> list[Row]:
    """Bytes given and bytes used."""
    allowed = stats.process_floor_bytes + stats.memory_bytes
    parts = "six" if stats.variants else "five"
    return [
        (
            "model",
            format_bytes(stats.model_bytes),
            f"{format_bytes(stats.expert_bytes)} of it experts at level {stats.level}",
        ),
        ("memory given", format_bytes(stats.memory_bytes), f"the sum of the next {parts}"),
        (
            "  expert arena",
            format_bytes(stats.arena_bytes),
            f"{share(stats.arena_bytes, stats.expert_bytes)} of the experts",
        ),
        ("  dense weights", format_bytes(stats.dense_bytes)),
        ("  KV cache", format_bytes(stats.kv_bytes)),
        ("  activations", format_bytes(stats.activation_bytes)),
        ("  staging", format_bytes(stats.staging_bytes)),
        *_variants(stats),
        ("process floor", format_bytes(stats.process_floor_bytes), "Python with torch, before any weight"),
        ("peak resident", format_bytes(stats.peak_rss_bytes), f"at most {format_bytes(allowed)}: floor + memory given"),
    ]


def cache_rows(stats: Stats) -> list[Row]:
    """What the expert cache did."""
    used = stats.hits + stats.misses
    reads = "direct reads" if stats.direct_io else "reads through the page cache"
    pages = "huge pages" if stats.huge_pages else "ordinary pages"
    return [
        ("expert hits", str(stats.hits), share(stats.hits, used)),
        ("expert misses", str(stats.misses), share(stats.misses, used)),
        ("bytes read", format_bytes(stats.bytes_read), f"{reads} into {pages}"),
        *ahead_rows(stats),
    ]


def ahead_rows(stats: Stats) -> list[Row]:
    """What came of reading ahead, if any was done."""
    if not stats.prefetches:
        return []
    return [
        (
            "read ahead",
            f"{100 * stats.prefetch_recall:.1f}% of missing experts",
            f"{stats.late_prefetches} of {stats.prefetches} reads too late, {format_bytes(stats.wasted_bytes)} unused",
        )
    ]


def time_rows(stats: Stats, elapsed_s: float) -> list[Row]:
    """Where the time of a run of `elapsed_s` seconds went."""
    parts = (
        ("  computing dense layers", stats.compute_s - stats.expert_s),
        ("  computing experts", stats.expert_s),
        ("  waiting for the disk", stats.demand_stall_s),
        *([("  waiting for late reads", stats.late_prefetch_stall_s)] if stats.prefetches else []),
        ("  other", max(0.0, elapsed_s - stats.compute_s - stats.stall_s)),
    )
    return [
        ("time", f"{elapsed_s:.2f} s"),
        *((name, f"{seconds:.2f} s", share(seconds, elapsed_s)) for name, seconds in parts),
    ]


def share(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def quality_rows(manifest: Manifest) -> list[Row]:
    """How the codes were found, and the mean error of each level."""
    facts = manifest.calibration
    if facts is None:
        return [("levels", f"{manifest.encoding}, as in the checkpoint")]
    rows: list[Row] = [("levels", f"{manifest.encoding}, exact at {manifest.exact_level} bits")]
    every = [errors for experts in facts.errors for errors in experts]
    for index, level in enumerate(manifest.levels):
        mean = sum(errors[index] for errors in every) / len(every)
        rows.append((f"  {level} bits", f"mean relative squared error of an expert {mean:.2g}"))
    text = f"{facts.tokens} tokens of {facts.text.name}" if facts.text else "none: codes from the weights alone"
    remark = f"{len(facts.unrouted)} experts got none of them" if facts.unrouted else ""
    return [*rows, ("calibration", text, remark), *(("warning", warning) for warning in facts.warnings)]
