"""From a store and options to a runner: plan first, allocate once, place the dense weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from moestro.bit_router import BitRouter, stored_bit_router_bytes
from moestro.config import RuntimeOptions
from moestro.cores import available_cores
from moestro.errors import StoreError
from moestro.hf.linears import lookup_names
from moestro.hf.skeleton import Skeleton, build_skeleton, config_from_dict
from moestro.kernels import make_kernels
from moestro.kernels.base import Kernels
from moestro.memory.arena import Arena, extent_bytes_for
from moestro.memory.budget import format_bytes, machine_bytes, resident_bytes
from moestro.memory.disk_profile import load_profile
from moestro.memory.heap import return_large_blocks
from moestro.memory.libraries import let_go_of_libraries
from moestro.memory.pages import HostBuffer
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.transfer import TransferEngine
from moestro.policy import LRU
from moestro.policy.choice import needs_gates
from moestro.policy.levels import BY_NET, LEVEL_POLICIES, QUALITIES, budget_of, choose_level_policy
from moestro.policy.observation import Shape
from moestro.runtime.bit_router import LevelScores, open_bit_router
from moestro.runtime.dense import place_dense
from moestro.runtime.dense_file import read_dense
from moestro.runtime.expert_spec import is_raw
from moestro.runtime.fetching import lend_slots
from moestro.runtime.foresight import Chosen, LayerForesight, make_foresight, open_history, stored_nets_bytes
from moestro.runtime.history import History
from moestro.runtime.kv import KVPool
from moestro.runtime.level import cut, resolve_level
from moestro.runtime.levels import LayerLevels, level_table, levels_up_to
from moestro.runtime.lookahead import Gates, has_gates
from moestro.runtime.lookup import RowsOnDisk
from moestro.runtime.model_shape import ModelShape, Sizes
from moestro.runtime.native import Blueprint, NativeForward, describe
from moestro.runtime.open_experts import open_experts
from moestro.runtime.plan import Plan, compute_threads, make_plan, probe_for
from moestro.runtime.probe import Probe
from moestro.runtime.read_order import ReadOrder
from moestro.runtime.runner import ModelRunner
from moestro.runtime.shares import MemoryShares, most_arena_bytes, reserved_arena_bytes
from moestro.runtime.variant_history import VariantHistories
from moestro.runtime.variant_parts import Wardrobe, scratch_bytes
from moestro.runtime.variants import Variants
from moestro.spans import Clock, Spans
from moestro.store.folders import cache_folder
from moestro.store.layout import Layout
from moestro.store.reader import Store
from moestro.store.variant_file import any_low_rank


@dataclass
class OpenModel:
    """A model ready to run, and the memory it holds until it is closed."""

    store: Store
    skeleton: Skeleton
    plan: Plan
    runner: ModelRunner
    transfers: TransferEngine
    arena_buffer: HostBuffer
    buffers: tuple[HostBuffer, ...]
    rows_on_disk: tuple[RowsOnDisk, ...]
    chosen: Chosen
    history: History | None
    level_policy: str
    shares: MemoryShares
    variants: Variants

    def close(self) -> None:
        """Stop the transfer threads, keep what was learned and give the memory back."""
        self.runner.planes.cancel_prefetches()
        self.transfers.close()
        if self.history is not None:
            self.history.save()
        self.variants.close()
        for rows in self.rows_on_disk:
            rows.close()
        for buffer in self.buffers:
            buffer.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def layouts_of(store: Store, level: int) -> tuple[Layout, ...]:
    """The layout of each MoE layer up to one of the store's levels; 0 is its exact level.

    Raises:
        RequestError: the store does not promise that level.
    """
    chosen = level_of(store, level)
    return tuple(cut(layer.layout, chosen) for layer in store.layers)


def level_of(store: Store, asked: int) -> int:
    """The level that a store is served at. Raises RequestError as `layouts_of`."""
    manifest = store.manifest
    return resolve_level(asked, exact=manifest.exact_level, promised=manifest.levels, name=str(store.path))


def shape_of_store(store: Store, skeleton: Skeleton, level: int) -> ModelShape:
    """The sizes that a plan needs, from a store. Raises RequestError as `layouts_of`."""
    return ModelShape.of(
        skeleton,
        name=store.path.name,
        sizes=Sizes.of_store(store, skeleton),
        layouts=layouts_of(store, level),
        level=level_of(store, level),
    )


def open_model(
    store: Store,
    options: RuntimeOptions,
    *,
    native: bool = True,
    logit_rows: int = 0,
    clock: Clock = time.perf_counter,
    lend_kv: bool = False,
) -> OpenModel:
    """Open `store` within the memory that `options` give.

    With `native` False every family runs on the general path, which tests compare with; so it does where a variant of
    the store needs it. `logit_rows`: how many rows of a step can get logits (0: the last one of each sequence).
    `clock` is what time is attributed by. With `lend_kv` whoever gives KV blocks to requests has to keep to the
    model's `shares`, where it has some.

    Raises:
        BudgetError: the memory is too little (nothing has been allocated then), or cannot be parsed.
        RequestError: the store does not promise the level asked for.
        UnsupportedModelError, StoreError: the store is of a model that cannot be run, or is damaged.
        TraceError: what was learned for the store cannot be used.
    """
    level_of(store, options.level)
    level_policy = level_policy_of(store, options)
    skeleton = build_skeleton(config_from_dict(store.config_dict))
    _check_layers(store, skeleton)
    router = None
    if level_policy == BY_NET:
        bits = levels_up_to(store, level_of(store, options.level))
        router = open_bit_router(store, hidden=int(skeleton.config.hidden_size), bits=bits)
    native = native and not any_low_rank(store)
    packed = not any(is_raw(layer.layout) for layer in store.layers)
    probed = probe_for(skeleton, options, packed=packed, native=native, logit_rows=logit_rows)
    kernels = make_kernels("auto", threads=compute_threads(options))
    return_large_blocks()
    floor = measure_floor(kernels)
    shape = shape_of_store(store, skeleton, options.level)
    plan = make_plan(shape, probed, options, config=skeleton.config, floor_bytes=floor)
    plan.require_fit()
    if floor + plan.memory_bytes > machine_bytes():
        logging.getLogger("moestro").warning(
            "%s of memory and a process floor of %s are more than this machine or container has (%s).",
            *map(format_bytes, (plan.memory_bytes, floor, machine_bytes())),
        )
    if plan.contexts_at_once < plan.max_sequences:
        logging.getLogger("moestro").warning(
            "%s have room for %d of %d whole contexts of %d tokens at once: long requests wait for each other.",
            *(format_bytes(plan.memory_bytes), plan.contexts_at_once, plan.max_sequences, plan.context),
        )
    blueprint = describe(skeleton, probed) if native else None
    arena_bytes = reserved_arena_bytes(plan, most_arena_bytes(plan) if lend_kv else plan.arena_bytes)
    return _assemble(
        store, skeleton, plan, probed, blueprint, options, level_policy, router, kernels, Spans(clock), arena_bytes
    )


def _assemble(
    store: Store,
    skeleton: Skeleton,
    plan: Plan,
    probed: Probe,
    blueprint: Blueprint | None,
    options: RuntimeOptions,
    level_policy: str,
    router: BitRouter | None,
    kernels: Kernels,
    spans: Spans,
    arena_bytes: int,
) -> OpenModel:
    chosen = Chosen.of(
        options,
        nets_bytes=stored_nets_bytes(store.path),
        expert_bytes=plan.expert_bytes,
        gates=has_gates(skeleton.model),
    )
    layouts = layouts_of(store, plan.level)
    # Where everything fits nothing is ever chosen to leave, nor read ahead for long.
    foresight, history, gates = None, None, None
    most = max(layer.num_experts for layer in store.layers)
    shape = Shape(len(store.layers), most, max(probed.experts_per_token))
    if not plan.whole:
        history = open_history(options, chosen, store, shape)
        foresight = make_foresight(chosen, store.path, shape, history)
    transfers = _transfers(store, spans.clock)
    left = lookup_names(skeleton) if plan.lookup_on_disk else frozenset()
    dense_buffer, tensors = read_dense(store, transfers.reader, leave=left)
    rows = {name: RowsOnDisk(name, store.dense[name], store.dense_file, places=plan.step_rows) for name in sorted(left)}
    place_dense(skeleton.model, {**tensors, **rows}, kernels)
    arena_buffer, kv_buffer = HostBuffer(arena_bytes), HostBuffer(plan.kv_bytes)
    slot_sizes = sorted({plane.nbytes for layout in layouts for plane in layout.planes})
    joined = planes_joined(plan, layouts, budget_of(level_policy, options.quality))
    extent_bytes, sizes = plan.extent_bytes, slot_sizes
    if joined:
        sizes = sorted({sum(plane.nbytes for plane in layout.planes) for layout in layouts})
        extent_bytes = extent_bytes_for(sizes)
    planes = PlaneCache(
        arena=Arena(arena_bytes, extent_bytes, sizes),
        buffer=arena_buffer,
        engine=transfers,
        policy=LRU() if foresight is None else foresight.eviction,
        locate=store.plane,
        joined=joined,
    )
    planes.watch = spans
    kv = KVPool(layers=probed.kv_layers, blocks=plan.kv_blocks, buffer=kv_buffer.tensor)
    shares = MemoryShares(plan, planes=planes, arena_buffer=arena_buffer, kv=kv, kv_buffer=kv_buffer)
    shares.refit()
    histories = None if history is None else VariantHistories(shape)
    variants = Variants(
        store,
        planes=planes,
        shares=shares,
        reader=transfers.reader,
        wardrobe=Wardrobe(skeleton.model, kernels),
        arena=arena_buffer.address,
        chains=[[plane.nbytes for plane in layout.planes] for layout in layouts],
        overhead_bytes=scratch_bytes(skeleton, plan.step_rows) if all(map(is_raw, layouts)) else 0,
        eviction=None if foresight is None else foresight.eviction,
        histories=histories,
        native=blueprint is not None,
    )
    planes.locate = variants.locate
    experts = open_experts(
        skeleton=skeleton,
        kernels=kernels,
        planes=planes,
        layouts=layouts,
        level=plan.level,
        arena=arena_buffer.tensor,
    )
    experts.spans = spans
    experts.part_planes = partial(shares.part_planes, slot_sizes)
    variants.followers.append(experts)
    experts.order = ReadOrder(options.order, transfers)
    if foresight is not None:
        if needs_gates(chosen.ahead):
            gates = Gates(skeleton.model, picks=max(probed.experts_per_token))
        experts.foresight = LayerForesight(
            foresight,
            planes,
            experts.chains,
            layouts,
            transfers,
            gates,
            picks=max(probed.experts_per_token),
            cores=available_cores(),
            fetches_ahead=options.prefetch == "on",
        )
    bits = levels_up_to(store, plan.level)
    prices = None if router is None else {QUALITIES[name]: price for name, price in router.prices.items()}
    table = level_table(store, layouts, bits=bits, picks=max(probed.experts_per_token), prices=prices)
    experts.levels = LayerLevels(
        LEVEL_POLICIES[level_policy](table),
        bits=bits,
        layouts=layouts,
        chains=experts.chains,
        planes=planes,
        eviction=None if foresight is None else foresight.eviction,
        scores=None if router is None else LevelScores(router, kernels),
    )
    if experts.foresight is not None:
        experts.foresight.levels = experts.levels
    native = None
    if blueprint is not None:
        lend_slots(experts, transfers, arena_buffer.address)
        native = NativeForward(blueprint, kv=kv, experts=experts, rows=plan.step_rows, context=plan.context)
        variants.followers.append(native)
    runner = ModelRunner(
        skeleton=skeleton,
        kernels=kernels,
        kv=kv,
        native=native,
        experts=experts,
        variants=variants,
        histories=histories,
    )
    if history is not None:
        runner.remember(history)
    return OpenModel(
        store=store,
        skeleton=skeleton,
        plan=plan,
        runner=runner,
        transfers=transfers,
        arena_buffer=arena_buffer,
        buffers=(dense_buffer, arena_buffer, kv_buffer),
        rows_on_disk=tuple(rows.values()),
        chosen=chosen,
        history=history,
        level_policy=level_policy,
        shares=shares,
        variants=variants,
    )


def planes_joined(plan: Plan, layouts: Sequence[Layout], budget: float) -> list[int]:
    """How many planes of an expert share a slot, by layer; empty: none do.

    They do where all planes of an expert are always used together: while every request is exact and of the base. Where
    everything fits there is nothing to gain.
    """
    counts = [len(layout.planes) for layout in layouts]
    return [] if plan.whole or budget or max(counts) == 1 else counts


def level_policy_of(store: Store, options: RuntimeOptions) -> str:
    """The level policy that the options mean for a store, checked with the quality that they ask for.

    Raises:
        RequestError: there is no such policy or quality, or the store lacks what they need.
    """
    facts = store.manifest.calibration
    measured = facts is not None and facts.sensitivity is not None
    routed = stored_bit_router_bytes(store.path) > 0
    policy = choose_level_policy(options.level_policy, measured=measured, routed=routed, store=str(store.path))
    budget_of(policy, options.quality)
    return policy


def _transfers(store: Store, clock: Clock) -> TransferEngine:
    """As the disk was found to like it, if it has ever been measured; never measured here."""
    known = load_profile(store.path, cache_folder())
    if known is None:
        return TransferEngine(clock=clock)
    return TransferEngine(known.threads, request_bytes=known.request_bytes, clock=clock)


def _check_layers(store: Store, skeleton: Skeleton) -> None:
    stored = [(layer.module, layer.num_experts) for layer in store.layers]
    wanted = [(layer.module, layer.num_experts) for layer in skeleton.expert_layers]
    if stored != wanted or set(store.dense) != set(skeleton.dense):
        raise StoreError(
            f"The tensors in {store.path} are not those that the installed transformers builds for this model. "
            "It was packed with another version: pack it again."
        )


def measure_floor(kernels: Kernels) -> int:
    """Bytes that this process has resident before any weight is read: the floor, which no budget includes."""
    _warm_up(kernels)
    coming_back = let_go_of_libraries()
    _warm_up(kernels)
    return resident_bytes() + coming_back


def _warm_up(kernels: Kernels) -> None:
    """Load what torch and the kernels load lazily, so that it counts as the process's floor."""
    ones = torch.ones(8, 64)
    kernels.linear(ones, torch.ones(16, 64, dtype=torch.bfloat16), None)
    pool, rows = torch.ones(1, 2, 16, 16), torch.zeros(8, dtype=torch.int32)
    kernels.attention(torch.ones(8, 4, 16), pool, pool, torch.zeros(1, 1, dtype=torch.int32), rows, rows, scale=1.0)
    torch.nn.functional.silu(ones)[torch.tensor([1, 0])].argmax().item()
    for _ in range(2):
        torch.softmax(ones, -1).topk(4).values.cumsum(-1).sort(-1)
        (ones.pow(2).mean(-1, keepdim=True).rsqrt() * ones).sigmoid().cos().sin().clone()
