"""`moestro plan`: what would be placed where under a number of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from moestro.cli.arguments import AsJson, Model
from moestro.cli.console import Row, print_json, print_table
from moestro.cli.options import Only
from moestro.config import RuntimeOptions
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.runtime.plan import Plan


def plan(
    model: Model,
    options: Annotated[RuntimeOptions, Only("memory", "context", "max_sequences", "threads", "level")],
    as_json: AsJson = False,
) -> None:
    """Show what would be placed where, and the least memory that works; needs the config only, not the weights."""
    from moestro.runtime.subject import Subject

    planned = Subject.open(model).plan(options)
    if as_json:
        print_json(_to_json(model, planned))
    elif planned.fits:
        _draw(model, planned)
    planned.require_fit()


def _to_json(model: str, planned: Plan) -> dict[str, Any]:
    return {"model": model, **planned.to_dict()}


def _draw(model: str, planned: Plan) -> None:
    parts: list[tuple[str, int, str]] = [
        ("dense weights", planned.dense_bytes, "input embeddings stay on disk" if planned.lookup_on_disk else ""),
        ("expert arena", planned.arena_bytes, f"{planned.arena_experts} of {planned.total_experts} experts"),
        ("KV cache", planned.kv_bytes, _kv_remark(planned)),
        ("activations", planned.activation_bytes, f"steps of up to {planned.step_rows} tokens"),
        ("staging", planned.staging_bytes, "kernels' scratch, sampling, policy, library pages"),
    ]
    parts.append(("left over", planned.memory_bytes - sum(size for _, size, _ in parts), ""))
    print_table(
        f"{format_bytes(planned.memory_bytes)} for {model}",
        [(name, format_bytes(size), remark) for name, size, remark in parts],
    )
    rows: list[Row] = [
        (
            "whole model",
            format_bytes(planned.model_bytes),
            f"{format_bytes(planned.expert_bytes)} of it experts at level {planned.level}",
        ),
        ("least memory that works", format_bytes(planned.least_bytes), f"{planned.least_bytes} bytes"),
        ("read per token", format_bytes(planned.expected_bytes_per_token), "if all experts were equally likely"),
        ("process floor", format_bytes(planned.floor_bytes), "Python with torch, on top of the memory given"),
    ]
    print_table("in all", rows)


def _kv_remark(planned: Plan) -> str:
    """How many sequences have their place in the KV cache."""
    whole = f"{min(planned.contexts_at_once, planned.max_sequences)} x {planned.context} tokens"
    if planned.contexts_at_once >= planned.max_sequences:
        return whole
    return f"{whole}; {planned.max_sequences} sequences if they are shorter"
