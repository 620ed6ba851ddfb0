"""Opening tiny stores for tests: by share of experts in memory, all options explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moestro.config import RuntimeOptions
from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.runtime.batch import BASE, PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, open_model, shape_of_store
from moestro.runtime.plan import Plan, make_plan, probe_for
from moestro.store.reader import Store


def plan_of(folder: Path, options: RuntimeOptions, memory_bytes: int = 1 << 40, native: bool = True) -> Plan:
    """The plan of a store, made as opening it makes it."""
    store = Store.open(folder)
    skeleton = build_skeleton(config_from_dict(store.config_dict))
    return make_plan(
        shape_of_store(store, skeleton, options.level),
        probe_for(skeleton, options, packed=store.manifest.encoding != "raw", native=native),
        replace(options, memory=str(memory_bytes)),
        config=skeleton.config,
        floor_bytes=0,
    )


def open_store(
    folder: Path, *, share: float = 1.0, native: bool = True, more_bytes: int = 0, **options: Any
) -> OpenModel:
    """Open with an arena for `share` of the experts (0: the least memory that works), and so much memory more."""
    wanted = RuntimeOptions(**{"context": 256, **options})
    memory = plan_of(folder, wanted, native=native).bytes_for_experts(share) + more_bytes
    return open_model(Store.open(folder), replace(wanted, memory=str(memory)), native=native)


class Feed:
    """Feeds token ids to a runner in chunks of the test's choosing and returns logits of every fed row."""

    def __init__(self, opened: OpenModel, *, every_row: bool = True, variants: Mapping[int, str] | None = None) -> None:
        """`every_row` false leaves it at the logits of each request's last row, as serving does. `variants` are those
        of requests that are not the base's."""
        self._runner = opened.runner
        self._slots: dict[int, int] = {}
        for request, name in (variants or {}).items():
            variant = opened.variants.open(name)
            assert opened.variants.enter(variant)
            assert variant.slot is not None
            self._slots[request] = variant.slot
        self._every_row = every_row
        self._starts: dict[int, int] = {}
        self._blocks: dict[int, list[int]] = {}

    def step(self, tokens: dict[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """One packed forward pass of new tokens by request: logits [rows, vocabulary] by request."""
        segments = []
        tokens = dict(sorted(tokens.items(), key=lambda one: self._slots.get(one[0], BASE)))
        for request, token_ids in tokens.items():
            start = self._starts.get(request, 0)
            blocks = self._blocks.setdefault(request, [])
            missing = blocks_for(start + len(token_ids)) - len(blocks)
            blocks.extend(self._runner.kv.allocate(missing))
            slot = self._slots.get(request, BASE)
            segments.append(Segment(request, list(token_ids), start, tuple(blocks), True, variant=slot))
            self._starts[request] = start + len(token_ids)
        batch = PackedBatch(segments)
        if self._every_row:
            batch.logit_rows = torch.arange(batch.rows)
        logits = self._runner.forward(batch)
        if not self._every_row:
            return dict(zip(tokens, logits.split(1), strict=True))
        return dict(zip(tokens, logits.split([len(ids) for ids in tokens.values()]), strict=True))


def logits_of(opened: OpenModel, token_ids: Sequence[int], chunk: int | None = None, variant: str = "") -> torch.Tensor:
    """Logits [T, V] of one sequence fed in chunks of `chunk` tokens (None: at once), to the base or a variant."""
    feed = Feed(opened, variants={0: variant} if variant else None)
    size = chunk or len(token_ids)
    pieces = [feed.step({0: token_ids[at : at + size]})[0] for at in range(0, len(token_ids), size)]
    return torch.cat(pieces)
