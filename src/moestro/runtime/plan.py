"""What the one number of bytes buys: dense weights, expert arena, KV cache, staging and activations.

A plan needs a model's shapes only, so it can be made before anything is packed, downloaded or allocated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from moestro.config import RuntimeOptions
from moestro.cores import available_cores
from moestro.errors import BudgetError
from moestro.hf.skeleton import Skeleton
from moestro.kernels.cpu import scratch_bytes
from moestro.memory.arena import extent_bytes_for, least_bytes_for
from moestro.memory.budget import format_bytes, parse_memory
from moestro.memory.pages import PAGE, round_up
from moestro.policy.observation import Shape
from moestro.runtime.batch import STEP_ROWS
from moestro.runtime.bit_router import bit_router_bytes
from moestro.runtime.foresight import foresight_bytes
from moestro.runtime.kv import BLOCK_ROWS, block_bytes, blocks_for
from moestro.runtime.lookup import lookup_table_bytes
from moestro.runtime.model_shape import ModelShape
from moestro.runtime.native import describe
from moestro.runtime.probe import Probe, probe

DEFAULT_CONTEXT = 4096
_STAGING_BYTES = 8 << 20
"""Allowance for library pages first touched by a real step, the allocator's rounding and request state.

Measured: 2 MiB of library pages and 2 to 3.5 MiB of heap beyond the plan's other parts, for 1 to 16 sequences.
"""

_SAMPLING_BYTES = 72
"""Per vocabulary entry while a token is sampled: a few arrays of 8-byte numbers and their sorted order."""

_SLOT_BYTES = 2 << 10
"""What Python and torch keep for the views into one slot (1.8 KiB measured)."""

_HISTORY_BYTES = 40
"""Per cached row that is handed back to latent attention: indices of the rows, and the table over them."""

_ACTIVATION_MARGIN = 1.25
"""Room for what an allocator keeps beside the live tensors that the probe counts."""

LEAST_SPARED_BYTES = 16 << 20
"""Embeddings stay in memory where leaving them on disk would not save this much."""

_LEAST_CHAINS = 2
"""Experts that the arena holds at least: one loads while the other is computed."""


@dataclass(frozen=True)
class Plan:
    """What is placed where. All sizes in bytes; `floor_bytes` (the process itself) is not part of `memory_bytes`.

    With `lookup_on_disk` the input embeddings stay on disk but for the rows used last; `spared_bytes` is what that
    leaves for experts, or would (0: the embeddings are small, or are needed whole). `dense_bytes` are those in memory.
    `kv_blocks` are those of a whole context for each of `max_sequences`, or as many as there is room for: at least one
    whole context; `missing_kv_bytes` are what the others would take. `least_bytes` do for one context and an arena of
    `least_arena_bytes`.
    """

    level: int
    memory_bytes: int
    floor_bytes: int
    model_bytes: int
    dense_bytes: int
    lookup_on_disk: bool
    spared_bytes: int
    expert_bytes: int
    kv_bytes: int
    activation_bytes: int
    staging_bytes: int
    arena_bytes: int
    whole_arena_bytes: int
    least_arena_bytes: int
    extent_bytes: int
    arena_experts: int
    total_experts: int
    least_bytes: int
    expected_bytes_per_token: int
    context: int
    max_sequences: int
    kv_blocks: int
    missing_kv_bytes: int
    step_rows: int
    fits: bool

    @property
    def fixed_bytes(self) -> int:
        """What is needed beside the expert arena."""
        return self.dense_bytes + self.kv_bytes + self.activation_bytes + self.staging_bytes

    @property
    def whole(self) -> bool:
        """Whether all experts fit: nothing ever has to leave."""
        return self.arena_bytes >= self.whole_arena_bytes

    @property
    def contexts_at_once(self) -> int:
        """Sequences that can have a whole context at once; those that need less are up to `max_sequences`."""
        return self.kv_blocks // blocks_for(self.context)

    def bytes_for_experts(self, share: float) -> int:
        """The memory to give so that the arena has `share` (0 to 1) of the experts' bytes, at least the least, and KV
        what it has in this plan.

        With a share of 1 the whole model is in memory.
        """
        fixed = self.fixed_bytes + self.lookup_on_disk * self.spared_bytes
        if share >= 1:
            return fixed + round_up(max(self.whole_arena_bytes, self.least_arena_bytes), PAGE)
        wanted = max(int(share * self.expert_bytes), self.least_arena_bytes)
        return fixed - self.spared_bytes + round_up(wanted, PAGE)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def require_fit(self) -> None:
        """Raise BudgetError, naming the least number that would do, when the memory given is too little."""
        if self.fits:
            return
        raise BudgetError(
            f"{format_bytes(self.memory_bytes)} is too little for this model: {format_bytes(self.least_bytes)} "
            f"({self.least_bytes} bytes) is the least that works with a context of {self.context} tokens. It holds the "
            f"dense weights ({format_bytes(self.dense_bytes)}), the KV cache of one such context "
            f"({format_bytes(self.kv_bytes)}), activations ({format_bytes(self.activation_bytes)}) and "
            "room for two experts. Give more memory, or ask for a shorter context."
        )


def longest_context(config: PreTrainedConfig) -> int:
    """The most tokens that the model was made for."""
    limit = int(getattr(config, "max_position_embeddings", 0) or DEFAULT_CONTEXT)
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "longrope":
        # Long-range factors would depend on the longest sequence in the batch: stay inside the short range.
        limit = min(limit, int(scaling.get("original_max_position_embeddings") or limit))
    return limit


def resolve_context(config: PreTrainedConfig, asked: int) -> int:
    """The longest prompt plus answer, in tokens: as asked, else the model's own limit or DEFAULT_CONTEXT.

    Raises:
        BudgetError: more than the model was made for.
    """
    limit = longest_context(config)
    if asked != 0 and not 2 <= asked <= limit:
        raise BudgetError(f"A context of {asked} tokens was asked for. This model takes 2 to {limit} (0: by itself).")
    return asked or min(limit, DEFAULT_CONTEXT)


def probe_for(
    skeleton: Skeleton, options: RuntimeOptions, *, packed: bool = False, native: bool = True, logit_rows: int = 0
) -> Probe:
    """The probe of a step as `options` allow it, on the path that it will take (`native` False: always the general).

    `packed`: experts are quantised. `logit_rows` get logits (0: the last row of each sequence).
    """
    if not 1 <= options.max_sequences <= STEP_ROWS:
        raise BudgetError(f"max_sequences is {options.max_sequences}, expected 1 to {STEP_ROWS}.")
    context = resolve_context(skeleton.config, options.context)
    rows, wanted = min(STEP_ROWS, context * options.max_sequences), logit_rows or options.max_sequences
    probed = probe(
        skeleton, rows=rows, history=context, most=context * options.max_sequences, logit_rows=wanted, packed=packed
    )
    blueprint = describe(skeleton, probed) if native else None
    if blueprint is None:
        return probed
    activation_bytes = blueprint.activation_bytes(
        rows=rows, context=context, logit_rows=wanted, experts_bytes=probed.experts_bytes
    )
    return replace(probed, activation_bytes=activation_bytes, activation_row_bytes=0)


def compute_threads(options: RuntimeOptions) -> int:
    """Threads that compute: as asked, else one per core that this process may run on."""
    if not 0 <= options.threads <= 1024:
        raise BudgetError(f"threads is {options.threads}, expected 1 to 1024 (0: one per available core).")
    return options.threads or available_cores()


def make_plan(
    shape: ModelShape, probed: Probe, options: RuntimeOptions, *, config: PreTrainedConfig, floor_bytes: int
) -> Plan:
    """Divide the memory that `options` give. What is not needed for anything else goes to the expert arena.

    Raises:
        BudgetError: the memory cannot be parsed. A plan that does not fit is returned, with `fits` false.
    """
    memory_bytes = parse_memory(options.memory).resolve(floor_bytes)
    context = resolve_context(config, options.context)
    extent = extent_bytes_for(shape.plane_sizes)
    whole = _whole_arena(shape, extent)
    least_arena = min(whole, max(least_bytes_for(chain * _LEAST_CHAINS, extent) for chain in shape.chains))
    spared = _spared_bytes(shape, probed.rows)
    one, activation_row, staging_row = blocks_for(context), *_row_bytes(probed)
    activation_bytes = int(probed.activation_bytes * _ACTIVATION_MARGIN)
    staging_bytes = _staging_bytes(shape, probed, options, config, context)
    block = block_bytes(probed.kv_layers)
    least = shape.dense_bytes - spared + activation_bytes + staging_bytes + one * block + least_arena
    wanted, cost = one * (options.max_sequences - 1), block + BLOCK_ROWS * (activation_row + staging_row)
    more = _more_blocks(memory_bytes - least, wanted=wanted, cost=cost, extent=extent)
    kv_blocks, kv_bytes = one + more, (one + more) * block
    activation_bytes += more * BLOCK_ROWS * activation_row
    staging_bytes += more * BLOCK_ROWS * staging_row
    room = memory_bytes - kv_bytes - activation_bytes - staging_bytes
    on_disk = spared > 0 and room - shape.dense_bytes < whole
    dense_bytes = shape.dense_bytes - on_disk * spared
    arena = max(0, min(whole, (room - dense_bytes) // PAGE * PAGE))
    arena_experts = _experts_in(shape, arena, extent)
    return Plan(
        level=shape.level,
        memory_bytes=memory_bytes,
        floor_bytes=floor_bytes,
        model_bytes=shape.dense_bytes + shape.expert_bytes,
        dense_bytes=dense_bytes,
        lookup_on_disk=on_disk,
        spared_bytes=spared,
        expert_bytes=shape.expert_bytes,
        kv_bytes=kv_bytes,
        activation_bytes=activation_bytes,
        staging_bytes=staging_bytes,
        arena_bytes=arena,
        whole_arena_bytes=whole,
        least_arena_bytes=least_arena,
        extent_bytes=extent,
        arena_experts=arena_experts,
        total_experts=sum(shape.experts),
        least_bytes=least,
        expected_bytes_per_token=_expected_bytes_per_token(shape, probed, arena_experts),
        context=context,
        max_sequences=options.max_sequences,
        kv_blocks=kv_blocks,
        missing_kv_bytes=(wanted - more) * cost,
        step_rows=probed.rows,
        fits=arena >= least_arena,
    )


def _more_blocks(spare: int, *, wanted: int, cost: int, extent: int) -> int:
    """KV blocks beside those of one context and two experts, which `spare` bytes are left for.

    Where they are fewer than `wanted` they leave an extent more: without it experts could not have what of them no
    request needs.
    """
    return wanted if wanted * cost <= spare else max(0, (spare - extent) // cost)


def _row_bytes(probed: Probe) -> tuple[int, int]:
    """What each row of the KV cache takes of activations and of staging, where rows are handed back to attention."""
    gathered = any(layer.gathered for layer in probed.kv_layers)
    return math.ceil(probed.activation_row_bytes * _ACTIVATION_MARGIN), _HISTORY_BYTES * gathered


def _spared_bytes(shape: ModelShape, rows: int) -> int:
    """What it saves to leave embeddings on disk, or 0 where it is too little to read a row for every token."""
    spared = shape.lookup_bytes - lookup_table_bytes(shape.lookup_row_bytes, rows)
    return spared if spared >= LEAST_SPARED_BYTES else 0


def _staging_bytes(
    shape: ModelShape, probed: Probe, options: RuntimeOptions, config: PreTrainedConfig, context: int
) -> int:
    scratch = scratch_bytes(
        # Rows of one call are up to 15 positions apart from the first that its scratch covers.
        threads=compute_threads(options),
        positions=context + 15,
        value_dim=probed.value_width,
        **_packed_scratch(shape, probed),
    )
    history = _row_bytes(probed)[1] * context
    sampling = _SAMPLING_BYTES * int(config.vocab_size)
    foresight = foresight_bytes(
        options,
        Shape(len(shape.experts), max(shape.experts), max(probed.experts_per_token)),
        nets_bytes=shape.nets_bytes,
        expert_bytes=shape.expert_bytes,
        step_rows=probed.rows,
    )
    router = bit_router_bytes(
        options.level_policy,
        stored_bytes=shape.bit_router_bytes,
        experts=max(shape.experts),
        levels=max(map(len, shape.chains)),
        rows=probed.rows,
    )
    return _STAGING_BYTES + scratch + history + sampling + foresight + router + _SLOT_BYTES * sum(shape.experts)


def _packed_scratch(shape: ModelShape, probed: Probe) -> dict[str, int]:
    """What the kernels of quantised weights need scratch for."""
    if shape.packed is None:
        return {}
    hidden, expert_width, dense_width = shape.packed
    return {
        "rows": probed.rows,
        "top_k": max(probed.experts_per_token),
        "hidden": hidden,
        "expert_width": expert_width,
        "dense_width": dense_width,
    }


def _whole_arena(shape: ModelShape, extent: int) -> int:
    """Bytes of an arena in which all planes have a slot: extents hold slots of one size each."""
    counts: Counter[int] = Counter()
    for chain, experts in zip(shape.chains, shape.experts, strict=True):
        for size in chain:
            counts[size] += experts
    if len(counts) == 1:
        ((size, count),) = counts.items()
        full, rest = divmod(count, extent // size)
        return full * extent + rest * size
    return sum(-(-count // (extent // size)) * extent for size, count in counts.items())


def _experts_in(shape: ModelShape, arena: int, extent: int) -> int:
    """Experts that the arena holds; where there are several sizes of planes, in the proportion in which they occur."""
    total = sum(shape.experts)
    if len(shape.plane_sizes) > 1 or len(set(shape.chains)) > 1:
        return total * arena // _whole_arena(shape, extent)
    size = shape.plane_sizes[0]
    slots = arena // extent * (extent // size) + arena % extent // size
    return min(total, slots // len(shape.chains[0]))


def _expected_bytes_per_token(shape: ModelShape, probed: Probe, arena_experts: int) -> int:
    """Bytes read per decoded token if all experts were equally likely: real routing has locality and reads less."""
    absent = 1 - arena_experts / sum(shape.experts)
    used: Sequence[int] = probed.experts_per_token
    return int(absent * sum(size * k for size, k in zip(shape.bytes_per_expert, used, strict=True)))
