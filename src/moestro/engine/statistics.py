"""What a model that is open has done so far, in one place."""

from __future__ import annotations

from moestro.engine.results import Stats
from moestro.memory.budget import peak_resident_bytes
from moestro.runtime.open import OpenModel
from moestro.spans import Part, Spans


def stats_of(opened: OpenModel, spans: Spans, *, huge_pages: bool) -> Stats:
    """What was placed where, and what happened since the model was opened; `spans` are those of whoever runs it."""
    plan, planes, runner = opened.plan, opened.runner.planes.stats, opened.runner.stats
    foreseen, shares = opened.runner.foreseen, opened.shares
    return Stats(
        hits=planes.hits,
        misses=planes.misses,
        evictions=planes.evictions,
        prefetches=planes.prefetches,
        late_prefetches=planes.late_prefetches,
        cancelled_prefetches=planes.cancelled_prefetches,
        wasted_prefetches=planes.wasted_prefetches,
        wasted_bytes=planes.wasted_bytes,
        prefetch_recall=foreseen.recall,
        prefetch_precision=foreseen.precision,
        bytes_read=planes.bytes_read,
        prefetched_bytes=planes.prefetched_bytes,
        stall_s=planes.stall_seconds,
        demand_stall_s=planes.stall_seconds - planes.late_stall_seconds,
        late_prefetch_stall_s=planes.late_stall_seconds,
        wall_s=spans.wall_seconds,
        time_s={part.name.lower(): seconds for part, seconds in zip(Part, spans.seconds, strict=True)},
        slowest_read_s=opened.transfers.stats.slowest_seconds,
        compute_s=runner.forward_s - planes.stall_seconds,
        expert_s=runner.experts_s - planes.stall_seconds,
        peak_rss_bytes=peak_resident_bytes(),
        process_floor_bytes=plan.floor_bytes,
        memory_bytes=shares.memory_bytes,
        model_bytes=plan.model_bytes,
        dense_bytes=plan.dense_bytes,
        expert_bytes=plan.expert_bytes,
        arena_bytes=shares.arena_bytes,
        kv_bytes=shares.kv_bytes,
        activation_bytes=plan.activation_bytes,
        staging_bytes=plan.staging_bytes,
        variants=opened.variants.resident,
        level=plan.level,
        policy=opened.chosen.policy,
        predictor=opened.chosen.predictor,
        ahead=opened.chosen.ahead,
        level_policy=opened.level_policy,
        levels_applied=opened.runner.levels_applied,
        path=opened.runner.path,
        direct_io=opened.transfers.direct,
        huge_pages=huge_pages,
        domain_tokens=runner.routed_tokens,
        domain_s=runner.routed_s,
    )
