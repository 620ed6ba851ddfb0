"""A forward pass on the native path: a call of the compiled decoder up to experts whose planes may have to be read.

Shapes: T rows of the batch, S rows whose logits are wanted, H hidden width, L MoE layers, K experts per token,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.memory.lending import Fetches
from moestro.runtime.allowance import PassAllowance
from moestro.runtime.batch import PackedBatch
from moestro.runtime.dense import LookupWeight
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.fetching import PassFetching
from moestro.runtime.kv import BLOCK_ROWS, KVPool
from moestro.runtime.native.blueprint import Blueprint, LayerParts, known_rows
from moestro.runtime.native.variant import Changes, native_variant
from moestro.runtime.native.weights import floats, norm_of, weight_of
from moestro.runtime.open_variant import OpenVariant
from moestro.runtime.replay import Replay
from moestro.spans import Event, Part

_TABLE_ROWS = 64
_ALIGNMENT = 64


class NativeForward:
    """The decoder of a blueprint whose weights are in place, with buffers for steps of up to `rows` tokens, in
    sequences of up to `context`.

    Experts that are where they were in memory are computed by the decoder on its way, a small step in a single call;
    others by `experts`. A row's logits have the same bits whatever else is in the step. Not thread-safe.
    """

    def __init__(self, blueprint: Blueprint, *, kv: KVPool, experts: RoutedExperts, rows: int, context: int) -> None:
        self._blueprint = blueprint
        self._kv = kv  # like the weights, kept because the decoder knows addresses only
        self._experts = experts
        self._vocabulary = blueprint.head.out_features
        # Memory is taken when it is first written to: short steps never touch most of it.
        self._residual = torch.empty(rows, blueprint.hidden)
        self._hidden_RH = torch.empty(rows, blueprint.hidden)
        self._scratch = torch.empty(rows, blueprint.scratch_width)
        self._quantised = torch.empty(blueprint.quantised_size(rows) + _ALIGNMENT, dtype=torch.uint8)
        places = blueprint.moe_layers * rows * blueprint.experts_per_token
        self._ids, self._weights = np.empty(places, dtype=np.int64), np.empty(places, dtype=np.float32)
        self._outputs = torch.empty(known_rows(rows) * blueprint.experts_per_token, blueprint.hidden)
        self._routing = np.empty((0, 0, 0), dtype=np.int64), np.empty((0, 0, 0), dtype=np.float32)
        self._cos, self._sin = _rotation(blueprint.rotary, context)
        embedding: Any = blueprint.embedding.weight
        self._lookup = embedding.matrix if isinstance(embedding, LookupWeight) else None
        self._token_ids = torch.empty(0, dtype=torch.int64)  # those of the step, kept while the decoder reads them
        self._replay: Replay | None = None
        self._early: AskedEarly | None = None
        self._fetching = PassFetching(experts)
        self._decoder = self._make_decoder(rows)
        self._allowance = PassAllowance(experts, self._decoder, picks=blueprint.experts_per_token)

    @property
    def kernel_seconds(self) -> float:
        """Seconds in matrix products and attention since the model was opened."""
        return self._decoder.kernel_seconds

    @property
    def experts_seconds(self) -> float:
        """Seconds in experts that the decoder computed since the model was opened, waiting for planes included."""
        return self._decoder.experts_seconds

    @property
    def routing(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts of every row of the last step, ids [L, T, K] and weights (fp32); views, until the next step."""
        return self._routing

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Logits [S, V] of the batch's wanted rows; all rows are appended to the KV cache."""
        spans = self._experts.spans
        last_TH = self._layers(batch, self._blueprint.moe_layers)
        wanted = batch.logit_rows
        logits_SV = torch.empty(len(wanted), self._vocabulary)
        spans.begin(Part.DENSE)
        self._decoder.logits(wanted.data_ptr(), len(wanted), logits_SV.data_ptr())
        spans.end(Event.HEAD, len(wanted))
        del last_TH  # the decoder knows its address only, and adds it before the head
        return logits_SV

    def route(self, batch: PackedBatch, layers: int) -> np.ndarray:
        """Experts [layers, T, K] of the batch's rows in the first MoE layers; little is computed after them."""
        self._layers(batch, layers - 1)
        return self.routing[0][:layers].copy()

    def _layers(self, batch: PackedBatch, last: int) -> torch.Tensor | None:
        """Run until MoE layer `last` is routed; to the end if there is no such layer.

        Returns what the decoder has still to add to the residual, if that is not its own.
        """
        self._experts.learn()
        self._begin(batch)
        try:
            fetches, spends = self._fetching.begins(batch), self._allowance.begins(batch)
            assert not (fetches and spends)
            return self._run(batch, last, fetches=fetches, spends=spends)
        except BaseException:
            self._fetching.give_up()
            raise

    def _run(self, batch: PackedBatch, last: int, *, fetches: bool, spends: bool) -> torch.Tensor | None:
        """As `_layers`, of a pass that has begun; `fetches`: slots are lent; `spends`: it has an allowance."""
        decoder, experts, spans = self._decoder, self._experts, self._experts.spans
        foresight = experts.foresight
        if self._early is not None and foresight is not None:
            self._early.ask(foresight.telling(batch.rows))
        ids_LTK, weights_LTK = self.routing
        done, address, delta_TH = 0, 0, None
        while True:
            if fetches and done:
                self._fetching.goes_on()
            if spends and done:
                self._allowance.goes_on()
            computed_s = decoder.experts_seconds
            spans.begin(Part.DENSE)
            awaited = -1 if foresight is None else foresight.awaited
            reached = decoder.run(address, awaited if done <= awaited < last else last)
            computed_s = decoder.experts_seconds - computed_s
            taken = self._fetching.take_back() if fetches else None
            computed_s -= 0.0 if taken is None else taken.waited_s
            spans.give(Part.EXPERTS, computed_s)
            spans.end(Event.DENSE, done, reached, computed_s)
            if taken is not None:
                self._count_fetched(batch, done, reached, taken)
            elif spends:
                self._allowance.count(done, ids_LTK[done:reached], weights_LTK[done:reached])
            elif reached > done:
                experts.count_known(done, ids_LTK[done:reached], weights_LTK[done:reached])
            if reached >= last:
                return delta_TH
            ids_TK, weights_TK = torch.from_numpy(ids_LTK[reached]), torch.from_numpy(weights_LTK[reached])
            delta_TH = experts(reached, self._hidden_RH[: batch.rows], ids_TK, weights_TK, batch.requests_of)
            assert delta_TH.dtype is torch.float32
            assert delta_TH.is_contiguous()
            done, address = reached + 1, delta_TH.data_ptr()

    def _count_fetched(self, batch: PackedBatch, done: int, reached: int, fetches: Fetches) -> None:
        ids_LTK, weights_LTK = self.routing
        try:
            self._fetching.count(done, ids_LTK[done:reached], weights_LTK[done:reached], fetches)
        except PlaneReadError as error:
            error.requests = batch.requests_of(np.arange(batch.rows))
            raise

    def entered(self, variant: OpenVariant) -> None:
        """A variant has come into memory: rows of it may follow."""
        assert variant.slot is not None
        self._decoder.set_variant(variant.slot, native_variant(self._blueprint, Changes(variant.changed)))

    def leaving(self, variant: OpenVariant, *, is_gone: bool) -> None:  # noqa: ARG002
        """It leaves: no row of it may follow."""
        assert variant.slot is not None
        self._decoder.set_variant(variant.slot, None)

    def replay_routing(self, replay: Replay) -> None:
        """As of `ModelRunner`."""
        self._replay = replay

    def _begin(self, batch: PackedBatch) -> None:
        sequences, most_blocks = batch.block_table_SM.shape
        if batch.rows != self._routing[0].shape[1]:
            shape = (self._blueprint.moe_layers, batch.rows, self._blueprint.experts_per_token)
            places = math.prod(shape)
            self._routing = self._ids[:places].reshape(shape), self._weights[:places].reshape(shape)
        self._token_ids = batch.token_ids_T if self._lookup is None else self._lookup.places(batch.token_ids_T)
        given_ids = given_weights = 0
        if self._replay is not None:
            ids_LTK, weights_LTK = self._replay.layers()
            assert ids_LTK.shape == self._routing[0].shape, "what is replayed is of another step"
            given_ids, given_weights = ids_LTK.ctypes.data, weights_LTK.ctypes.data
        self._decoder.begin(
            self._token_ids.data_ptr(),
            batch.rows,
            batch.block_table_SM.data_ptr(),
            sequences,
            most_blocks,
            batch.sequence_T.data_ptr(),
            batch.position32_T.data_ptr(),
            runs=batch.runs,
            variant_ids=batch.token_ids_T.data_ptr(),
            given_ids=given_ids,
            given_weights=given_weights,
        )

    def _make_decoder(self, rows: int) -> _native.Decoder:
        blueprint = self._blueprint
        decoder = _native.Decoder(
            embedding=_weight(blueprint.embedding),
            norm=_norm(blueprint.norm),
            head=_weight(blueprint.head),
            rotation=_native.Rotation(self._cos.data_ptr(), self._sin.data_ptr(), *self._cos.shape),
            residual=self._residual.data_ptr(),
            hidden=self._hidden_RH.data_ptr(),
            scratch=self._scratch.data_ptr(),
            scratch_width=blueprint.scratch_width,
            quantised=-(-self._quantised.data_ptr() // _ALIGNMENT) * _ALIGNMENT,
            quantised_size=blueprint.quantised_size(rows),
            ids=self._ids.ctypes.data,
            weights=self._weights.ctypes.data,
            outputs=self._outputs.data_ptr(),
            picks=blueprint.experts_per_token,
            rows=rows,
            moe_layers=blueprint.moe_layers,
            known_rows=known_rows(rows),
            blocks=self._kv.blocks,
            block_size=BLOCK_ROWS,
        )
        for index, layer in enumerate(blueprint.layers):
            decoder.add(_layer(layer, *self._kv.pools(index)))
        for moe_layer, known in enumerate(self._experts.known):
            if known is not None:
                decoder.know(moe_layer, known)
        lending = self._experts.planes.lending
        if lending is not None:
            decoder.fetch(lending.fetching)
        foresight = self._experts.foresight
        if foresight is not None and foresight.gates is not None:
            self._early = AskedEarly(decoder, rows=known_rows(rows), candidates=foresight.candidates)
            foresight.gates = self._early
        return decoder


class AskedEarly:
    """What the decoder asks the next layer's router on its way, in steps of up to `rows` rows."""

    def __init__(self, decoder: _native.Decoder, *, rows: int, candidates: int) -> None:
        self._decoder = decoder
        self._ids = np.empty(rows * candidates, dtype=np.int64)
        self._candidates = candidates
        self._telling = 0

    def ask(self, telling: int) -> None:
        """Have steps from now on come back where one of so many first candidates is not in memory; 0: do not ask."""
        if telling != self._telling:
            self._telling = telling
            self._decoder.look_ahead(self._ids.ctypes.data if telling else 0, self._candidates, telling)

    def candidates(self, _layer: int, _hidden_TH: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Of the layer that the decoder has come back at: (1, ids [T, C]), or nothing."""
        rows = self._decoder.seen_rows
        if rows:
            yield 1, self._ids[: rows * self._candidates].reshape(rows, self._candidates)


def _rotation(rotary: Any, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own cosines and sines of every position, [context, D / 2] each (their other half repeats it)."""
    half = rotary.inv_freq.numel()
    tables = torch.empty(2, context, half)
    for first in range(0, context, _TABLE_ROWS):
        # A multiple of 32 positions: torch treats the end of a tensor differently (see narrow.py).
        positions = torch.arange(first, first + _TABLE_ROWS).unsqueeze(0)
        for table, values in zip(tables, rotary(tables, position_ids=positions), strict=True):
            table[first : first + _TABLE_ROWS] = values[0, : context - first, :half]
    return tables[0], tables[1]


def _layer(parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> _native.Layer:
    layer, attention = _native.Layer(), parts.attention
    layer.input_norm, layer.post_norm = _norm(parts.input_norm), _norm(parts.post_norm)
    layer.q, layer.k = _weight(attention.q), _weight(attention.k)
    layer.v, layer.o = _weight(attention.v), _weight(attention.o)
    if attention.q_norm is not None and attention.k_norm is not None:
        layer.q_norm, layer.k_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    layer.clip = attention.clip
    layer.heads, layer.heads_kv, layer.head_dim = attention.heads, attention.heads_kv, attention.head_dim
    layer.keys, layer.values = _target(keys), _target(values)
    layer.scale, layer.window, layer.softcap = attention.scale, attention.window, attention.softcap
    if attention.sinks_owner is not None:
        layer.sinks = floats(attention.sinks_owner.sinks)
    if parts.mlp is not None:
        mlp = parts.mlp
        scale = _native.Weight() if mlp.scale is None else _weight(mlp.scale)
        layer.mlp = _native.Mlp(_weight(mlp.gate), _weight(mlp.up), _weight(mlp.down), scale)
    if parts.router is not None:
        layer.router, layer.routing = _weight(parts.router), parts.routing
    return layer


def _weight(module: Any) -> _native.Weight:
    return weight_of(module.weight, getattr(module, "bias", None))


def _norm(module: Any) -> _native.Norm:
    return norm_of(module.weight, module)


def _target(pool: torch.Tensor) -> _native.KvTarget:
    block_stride, head_stride, position_stride, one = pool.stride()
    assert one == 1
    return _native.KvTarget(pool.data_ptr(), block_stride, head_stride, position_stride)
