"""How many requests to run together when nobody waits for any single one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moestro.config import RuntimeOptions, SamplingParams
from moestro.runtime.plan import Plan, resolve_context
from moestro.runtime.subject import Subject

_DISK_TO_MEMORY = 4
"""How many bytes of memory are read in the time of one from the disk."""

_MOST = 64
"""Most sequences at once: with more, a step of the compiled kernels costs what its rows cost."""


def options_for(
    subject: Subject, options: RuntimeOptions, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
) -> RuntimeOptions:
    """The options under which these requests take least time together.

    A context that was not asked for is what the longest request needs, so that more of them fit; `max_sequences` is at
    least what was asked for, and as many as make a token cheapest: what a layer reads serves every row of a step, but
    each sequence's KV rows take the place of experts.

    Raises:
        BudgetError: the memory does not do for `max_sequences` as asked for, or the options are not valid.
    """
    longest = max(len(ids) + one.max_tokens for ids, one in zip(prompts, sampling, strict=True))
    limit = resolve_context(subject.skeleton.config, options.context)
    fixed = replace(options, context=options.context or max(2, min(limit, longest)))
    return most_at_once(subject, fixed, most=min(_MOST, len(prompts)))


def most_at_once(subject: Subject, options: RuntimeOptions, *, most: int) -> RuntimeOptions:
    """The options with as many sequences as make a token cheapest: at least as many as they have, at most `most`.

    Raises:
        BudgetError: the memory does not do for the options as they are.
    """
    subject.plan(options).require_fit()
    best, least = options, float("inf")
    for count in _counts(options.max_sequences, most):
        candidate = replace(options, max_sequences=count)
        plan = subject.plan(candidate)
        if plan.contexts_at_once < count:
            break
        cost = cost_per_token(plan, experts=subject.skeleton.expert_layers[0].num_experts, picks=_picks(subject))
        if cost <= least:
            best, least = candidate, cost
    return best


def cost_per_token(plan: Plan, *, experts: int, picks: int) -> float:
    """What a decoded token costs if all experts are equally likely, in bytes that are read from memory.

    A step of n rows, one of each sequence, wants 1 - (1 - picks / experts)^n of the experts. It reads them and the
    dense weights from memory, and before that, from the disk, the part that the arena does not hold.
    """
    rows = plan.max_sequences
    wanted = 1 - (1 - picks / experts) ** rows
    absent = 1 - min(1.0, plan.arena_experts / plan.total_experts)
    return (plan.dense_bytes + wanted * plan.expert_bytes * (1 + _DISK_TO_MEMORY * absent)) / rows


def _counts(first: int, most: int) -> list[int]:
    counts = [first]
    while counts[-1] < most:
        counts.append(min(most, 2 * counts[-1]))
    return counts


def _picks(subject: Subject) -> int:
    return max(subject.experts_per_token)
