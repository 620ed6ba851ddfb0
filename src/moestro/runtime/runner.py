"""One forward pass of the model over a packed batch, its experts computed from planes in the arena.

Shapes: T rows of the batch, S rows whose logits are wanted, H hidden or heads, K experts per token, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moestro.hf.skeleton import Skeleton, is_experts_module
from moestro.kernels.base import Kernels
from moestro.policy.foresight import Foreseen
from moestro.runtime import hooks
from moestro.runtime.batch import BASE, PackedBatch
from moestro.runtime.cache import HookedCache
from moestro.runtime.context import AttentionCall, forward_pass
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.history import History
from moestro.runtime.kv import KVPool
from moestro.runtime.lookahead import Lookahead
from moestro.runtime.narrow import plain
from moestro.runtime.native import NativeForward
from moestro.runtime.replay import Replay
from moestro.runtime.variant_history import VariantHistories
from moestro.runtime.variants import Variants
from moestro.spans import Event, Part, Spans
from moestro.trace import Recorder, StepRouting


@dataclass
class RunnerStats:
    """Seconds in forward passes, and of those in experts (waiting for planes included). `route` is counted apart."""

    forward_s: float = 0.0
    experts_s: float = 0.0
    routed_tokens: int = 0
    routed_s: float = 0.0


class _Routed(Exception):  # noqa: N818
    """As many layers as were asked for have been routed: the rest of the forward pass is not wanted."""


class ModelRunner:
    """The model with its hooks. Not thread-safe: one forward pass at a time.

    `recorder` is told of every step that goes through, if there is one.
    """

    def __init__(
        self,
        *,
        skeleton: Skeleton,
        kernels: Kernels,
        kv: KVPool,
        experts: RoutedExperts,
        variants: Variants,
        histories: VariantHistories | None = None,
        native: NativeForward | None = None,
    ) -> None:
        self.stats = RunnerStats()
        self.recorder: Recorder | None = None
        self.routing_logs: dict[int, Callable[[int, np.ndarray], None]] = {}
        self._history: History | None = None
        self._lookahead: Lookahead | None = None
        self._replay: Replay | None = None
        self.native = native
        self.variants, self._histories = variants, histories
        self.kv = kv
        self.planes = experts.planes
        self._model = skeleton.model
        self._kernels = kernels
        self._batch: PackedBatch | None = None
        self._cache = HookedCache(skeleton.config.model_type, self.cache_rows)
        self._experts = experts
        self.spans: Spans = experts.spans
        self._routed: list[tuple[np.ndarray, np.ndarray]] = []
        self._route_only = 0  # so many MoE layers, 0 for a whole pass
        modules = (module for module in self._model.modules() if is_experts_module(module))
        self._layer_of = {id(module): layer for layer, module in enumerate(modules)}
        hooks.install(self._model)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits [S, V] in fp32 of the segments that want them, in order. The rows are appended to the KV cache.

        Raises:
            PlaneReadError: a plane that this batch needs could not be read.
        """
        with self.spans.within(Part.PYTHON, Event.FORWARD, batch.rows, len(batch.segments)):
            return self._forward(batch)

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        started = time.perf_counter()
        try:
            with _computing():
                if batch.runs:
                    self._set_apart(batch)
                    if self.native is None:
                        return torch.cat([self._pass(part) for part in batch.parts()])
                return self._pass(batch)
        finally:
            self.stats.forward_s += time.perf_counter() - started
            self.stats.experts_s = self._experts.seconds + (self.native.experts_seconds if self.native else 0.0)

    def _set_apart(self, batch: PackedBatch) -> None:
        """Requests of variants are remembered beside these."""
        if self.recorder is None:
            return
        for segment in batch.segments:
            if segment.variant != BASE:
                collections = None if self._histories is None else self._histories.of(segment.variant)
                self.recorder.set_apart(segment.request, collections)

    def _pass(self, batch: PackedBatch) -> torch.Tensor:
        """The logits of a step; on the general path it has rows of one variant, or of the base."""
        self._batch = batch
        self.spans.begin(Part.POLICY)
        if self._experts.foresight is not None:
            self._experts.foresight.step(batch.request_rows)
        if self._replay is not None:
            self._replay.begin(batch.segments)
        self._experts.step(batch, self.variants.deltas(batch))
        self.spans.end(Event.BEGIN)
        try:
            if self.native is not None:
                return self._recorded(batch, self.native(batch))
            with self.variants.wearing(batch.segments[0].variant):
                return self._recorded(batch, self._general_forward(batch))
        finally:
            self._batch = None
            self._forget_routing()

    def _recorded(self, batch: PackedBatch, logits_SV: torch.Tensor) -> torch.Tensor:
        """What a step gave, after who wants to know has been told what it routed."""
        if self.recorder is None and not self.routing_logs:
            return logits_SV
        routing = self._routing(with_weights=self.recorder is not None and self.recorder.keep)
        if self.recorder is not None:
            self.recorder.step(batch.segments, routing)
        first = 0
        for segment in batch.segments:
            rows = slice(first, first := first + len(segment.token_ids))
            if segment.request in self.routing_logs:
                self.routing_logs[segment.request](segment.start, routing.experts_LTK[:, rows].swapaxes(0, 1))
        return logits_SV

    def route(self, batch: PackedBatch, layers: int) -> np.ndarray:
        """Experts [T, layers, K] that the base picks for the batch's rows in its first MoE layers. Nobody is told.

        Little is computed after the last of these layers' routers, and no expert of it. Rows are written to the batch's
        KV blocks as far as layers have run, so they must be nobody else's.

        Raises:
            PlaneReadError: a plane that this needs could not be read.
        """
        assert not batch.runs
        assert 0 < layers <= len(self._experts.chains)
        started = time.perf_counter()
        foresight, self._experts.foresight = self._experts.foresight, None
        self._batch = batch
        try:
            with _computing(), self.spans.within(Part.PYTHON, Event.FORWARD, batch.rows, len(batch.segments)):
                self._experts.step(batch, self.variants.deltas(batch))
                ids_LTK = (
                    self._general_route(batch, layers) if self.native is None else self.native.route(batch, layers)
                )
        finally:
            self._experts.foresight = foresight
            self._batch = None
            self._forget_routing()
            self.stats.routed_tokens += batch.rows
            self.stats.routed_s += time.perf_counter() - started
        return ids_LTK.swapaxes(0, 1)

    def _general_route(self, batch: PackedBatch, layers: int) -> np.ndarray:
        self._route_only = layers
        try:
            self._general_forward(batch)
        except _Routed:
            pass
        finally:
            self._route_only = 0
        return np.stack([ids_TK for ids_TK, _ in self._routed])

    @property
    def foreseen(self) -> Foreseen:
        """What prefetching has done since the model was opened."""
        return Foreseen() if self._experts.foresight is None else self._experts.foresight.foreseen

    @property
    def path(self) -> str:
        """How a forward pass runs: "native" (compiled layers) or "general" (transformers' own layers)."""
        return "general" if self.native is None else "native"

    def _general_forward(self, batch: PackedBatch) -> torch.Tensor:
        with forward_pass(self), self.spans.within(Part.DENSE, Event.GENERAL):
            output = self._model(
                input_ids=batch.token_ids_T.unsqueeze(0),
                position_ids=batch.positions_T.unsqueeze(0),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=batch.logit_rows,
            )
        logits_SV: torch.Tensor = plain(output.logits[0])
        return logits_SV.float()

    @property
    def batch(self) -> PackedBatch:
        """The batch of the forward pass under way."""
        assert self._batch is not None
        return self._batch

    def check_mask(self, mask_function: Any, window: int) -> None:
        """The probe has checked the family's masks already."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of the batch's rows over their own sequences' histories: [T, H, V]."""
        batch = self.batch
        layer = int(call.module.layer_idx)  # type: ignore[arg-type]
        if self.kv.layers[layer].gathered:
            # One row per block: the histories lie back to back.
            keys = call.key[0].transpose(0, 1).unsqueeze(2)
            values = call.value[0].transpose(0, 1).unsqueeze(2)
            table = batch.history_table
        else:
            keys, values = self.kv.pools(layer)
            table = batch.block_table_SM
        return self._kernels.attention(
            call.query[0].transpose(0, 1),
            keys,
            values,
            table,
            batch.sequence_T,
            batch.position32_T,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks_H=call.sinks_H,
        )

    def cache_rows(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the batch's rows; hand whole histories back to families that build their keys from them."""
        self.kv.write(layer, keys[0], values[0], self.batch.new_rows)
        if self.kv.layers[layer].gathered:
            return self.kv.gather(layer, self.batch.history)
        return keys, values

    def experts(
        self, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Routed experts of the layer that `module` belongs to, [T, H].

        Raises:
            PlaneReadError: a plane could not be read; the error names the requests that needed it.
        """
        layer = self._layer_of[id(module)]
        if self._replay is not None:
            index_TK, weights_TK = map(torch.from_numpy, self._replay.layer(layer))
        if self.recorder is not None or self.routing_logs or self._route_only:
            self._routed.append((index_TK.numpy(), plain(weights_TK).float().numpy()))
        if len(self._routed) == self._route_only > 0:
            raise _Routed
        return self._experts(layer, hidden_TH, index_TK, weights_TK, self.batch.requests_of)

    def remember(self, history: History) -> None:
        """Have the history told of requests, from now on."""
        self._history = history
        self.recorder = Recorder(self.expert_counts.shape[1], collections=history.collections)

    def look_ahead(self, layers: int) -> None:
        """Have the recorder told, from now on, what the gates of the next `layers` layers would pick.

        Raises:
            UnsupportedModelError: the family's routers are not known.
        """
        assert self.native is None, "lookahead needs the general path"
        self._lookahead = Lookahead(self._model, ahead=layers)

    def replay_routing(self, replay: Replay) -> None:
        """Take experts and weights from `replay` from now on, whatever the routers say: for measurements only."""
        self._replay = replay
        if self.native is not None:
            self.native.replay_routing(replay)

    def _forget_routing(self) -> None:
        self._routed.clear()
        if self._lookahead is not None:
            self._lookahead.forget()

    def end_request(self, request: int) -> None:
        """Nothing more comes of a request, whether it ever came this far or not."""
        self.routing_logs.pop(request, None)
        if self.recorder is not None:
            self.recorder.end(request)
        if self._history is not None:
            self._history.ended()
        if self._experts.foresight is not None:
            self._experts.foresight.end(request)

    def _routing(self, *, with_weights: bool) -> StepRouting:
        """What the step that has just gone through routed. Without weights, they may change."""
        if self.native is not None:
            ids_LTK, weights_LTK = self.native.routing
            return StepRouting(ids_LTK.copy(), weights_LTK.copy() if with_weights else weights_LTK)
        experts, weights = (np.stack(one) for one in zip(*self._routed, strict=True))
        return StepRouting(experts, weights, None if self._lookahead is None else self._lookahead.take(experts))

    @property
    def levels_applied(self) -> dict[str, int]:
        """How many experts of rows that need not be exact were computed at each level, 0 for those left out."""
        levels = self._experts.levels
        if levels is None:
            return {}
        return {str(bits): int(count) for bits, count in zip((0, *levels.bits), levels.applied_D, strict=True)}

    def held(self) -> np.ndarray:
        """Bits of each expert in memory, as `LayerLevels.held`."""
        assert self._experts.levels is not None
        return self._experts.levels.held()

    @property
    def expert_counts(self) -> np.ndarray:
        """Rows routed to each expert since the model was opened: int64 [MoE layers, experts]."""
        return self._experts.counts_LE


@contextmanager
def _computing() -> Iterator[None]:
    """How a forward pass computes."""
    torch_threads = torch.get_num_threads()
    # torch would cut elementwise work where its threads meet, and round the elements at a cut differently.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(torch_threads)
