"""A small decoder with experts in memory, and fine-tunes of it, made of random parts.

Shapes: T rows, H hidden, N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moestro import _native
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.shapes import native_delta, native_expert_delta
from moestro.kernels.specs import ActivationSpec, ExpertSpec, MatrixSpec
from moestro.quant import make_encoding
from moestro.quant.flat import flat_encode
from moestro.quant.groups import group_size
from packed_matrices import Experts, FineTune, PackedDelta, Source, filled_delta, random_fine_tune

HIDDEN, HEADS, HEADS_KV, DIM, INNER, VOCABULARY, WIDTH = 64, 4, 2, 16, 48, 40, 32
EXPERTS = PICKS = 4  # all of them, so that a last bit of a router changes no choice
LAYERS, ROWS, CONTEXT, BLOCKS, BLOCK = 2, 24, 64, 12, 16
MATRICES: Mapping[str, tuple[int, int]] = {
    "q": (HEADS * DIM, HIDDEN),
    "k": (HEADS_KV * DIM, HIDDEN),
    "v": (HEADS_KV * DIM, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "scale": (1, HIDDEN),
    "router": (EXPERTS, HIDDEN),
}
NORMS: Mapping[str, int] = {"input_norm": HIDDEN, "post_norm": HIDDEN, "q_norm": DIM, "k_norm": DIM}

Dense = dict[str, torch.Tensor]
"""`embedding`, `head`, `norm`, and of layer i `i.q` and so on: matrices with their biases as `i.q.bias`."""


@dataclass(frozen=True)
class Changed:
    """A fine-tune: what it puts in place of tensors of its base, what it adds to others, and its experts."""

    replaced: Dense = field(default_factory=dict)
    deltas: dict[str, PackedDelta] = field(default_factory=dict)
    experts: FineTune | None = None


def random_dense(source: Source) -> Dense:
    dense = {"embedding": source.normal(VOCABULARY, HIDDEN), "head": source.normal(VOCABULARY, HIDDEN) * 0.2}
    dense["norm"] = 1 + 0.1 * source.normal(HIDDEN)
    for layer in range(LAYERS):
        for name, (rows, columns) in MATRICES.items():
            dense[f"{layer}.{name}"] = source.normal(rows, columns) / columns**0.5
            dense[f"{layer}.{name}.bias"] = 0.1 * source.normal(rows)
        for name, width in NORMS.items():
            dense[f"{layer}.{name}"] = 1 + 0.1 * source.normal(width)
        dense[f"{layer}.sinks"] = source.normal(HEADS)
    return dense


def random_expert_set(source: Source) -> Experts:
    """At four bits, with weights of an ordinary size."""
    maker, planes = make_encoding("nested"), []
    shapes = ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    for _ in range(EXPERTS):
        parts = [maker.encode(source.normal(*shape) / shape[1] ** 0.5, levels=(2, 3, 4)) for shape in shapes]
        planes.append(tuple(torch.cat(pair) for pair in zip(*(part.values() for part in parts), strict=True)))
        starts = tuple(len(plane) for plane in parts[0].values())
    up, down = (
        MatrixSpec("nested", *shape, group_size(shape[1]), offsets)
        for shape, offsets in zip(shapes, ((0,) * len(starts), starts), strict=True)
    )
    spec = ExpertSpec(up, down, None, None, "halves", ActivationSpec("silu"))
    return Experts(spec, tuple(planes))


def random_change(source: Source, experts: Experts, *, bits: int) -> Changed:
    """Changes something of every kind."""
    dense = random_dense(source)
    replaced = {name: dense[name] for name in ("norm", "0.input_norm", "1.q_norm", "1.sinks", "0.scale", "1.router")}
    replaced |= {f"{name}.bias": dense[f"{name}.bias"] for name in ("0.scale", "1.router")}
    named = ["embedding", "head", *(f"{layer}.{name}" for layer in range(LAYERS) for name in "qkvo")]
    named += ["0.gate", "0.down", "1.gate", "1.up", "1.down"]
    deltas = {name: filled_delta(source, *dense[name].shape, bits=bits, salient=3, size=0.05) for name in named}
    return Changed(replaced, deltas, random_fine_tune(source, experts, bits=bits, share=0.05, size=0.05))


class Model:
    """A decoder, its memory, and fine-tunes in slots. `bits` 8 quantises the matrices of attention, MLPs and head."""

    def __init__(self, dense: Dense, experts: Experts, *, bits: int = 16, known: bool = True) -> None:
        self._kept: list[Any] = []
        self._bits, self._known, self.experts = bits, known, experts
        self.hidden = torch.zeros(ROWS, HIDDEN)
        self._ids = torch.zeros(LAYERS * ROWS * PICKS, dtype=torch.int64)
        self._weights = torch.zeros(LAYERS * ROWS * PICKS)
        angle = torch.arange(CONTEXT)[:, None] / 10.0 ** torch.arange(DIM // 2)
        quantised = max(_native.quantised_bytes(ROWS, width, group_size(width)) for width in (HIDDEN, INNER))
        self.decoder = _native.Decoder(
            embedding=self.weight(dense, "embedding", plain=True),
            norm=self.norm(dense["norm"]),
            head=self.weight(dense, "head"),
            rotation=_native.Rotation(self.at(angle.cos()), self.at(angle.sin()), CONTEXT, DIM // 2),
            residual=self.at(torch.zeros(ROWS, HIDDEN)),
            hidden=self.hidden.data_ptr(),
            scratch=self.at(torch.zeros(ROWS, 256)),
            scratch_width=256,
            quantised=self.at(torch.zeros(quantised, dtype=torch.uint8)),
            quantised_size=quantised,
            ids=self._ids.data_ptr(),
            weights=self._weights.data_ptr(),
            outputs=self.at(torch.zeros(ROWS * PICKS, HIDDEN)),
            picks=PICKS,
            rows=ROWS,
            moe_layers=LAYERS,
            known_rows=ROWS,
            blocks=BLOCKS,
            block_size=BLOCK,
        )
        for layer in range(LAYERS):
            self.decoder.add(self._layer(dense, layer))
        self.planes_LEP = [experts.addresses([4] * EXPERTS) for _ in range(LAYERS)]
        self._experts_known = [
            CpuKernels(threads=2).known_experts(experts.spec, planes_EP, [4]) for planes_EP in self.planes_LEP
        ]
        for layer, one in enumerate(self._experts_known):
            if known:
                self.decoder.know(layer, one)

    def _keep(self, kept: Any) -> Any:
        self._kept.append(kept)
        return kept

    def at(self, tensor: torch.Tensor) -> int:
        return int(self._keep(tensor.contiguous()).data_ptr())

    def norm(self, weight: torch.Tensor) -> _native.Norm:
        return _native.Norm(self.at(weight), len(weight), 1e-6)

    def weight(self, dense: Dense, name: str, *, plain: bool = False) -> _native.Weight:
        weight_NK, bias_N = dense[name], dense.get(f"{name}.bias")
        outputs, inputs = weight_NK.shape
        flat = self._bits == 8 and outputs >= 16 and not plain
        data = self.at(flat_encode(weight_NK, 8) if flat else weight_NK)
        bias = 0 if bias_N is None else self.at(bias_N)
        return _native.Weight(3 if flat else 0, data, outputs, inputs, group_size(inputs) if flat else 0, bias)

    def _layer(self, dense: Dense, number: int) -> _native.Layer:
        layer = _native.Layer()
        for name in NORMS:
            setattr(layer, name, self.norm(dense[f"{number}.{name}"]))
        for name in ("q", "k", "v", "o", "router"):
            setattr(layer, name, self.weight(dense, f"{number}.{name}"))
        layer.mlp = _native.Mlp(*(self.weight(dense, f"{number}.{name}") for name in ("gate", "up", "down", "scale")))
        layer.heads, layer.heads_kv, layer.head_dim, layer.scale = HEADS, HEADS_KV, DIM, DIM**-0.5
        layer.sinks = self.at(dense[f"{number}.sinks"])
        for name in ("keys", "values"):
            pool = self._keep(torch.zeros(BLOCKS, HEADS_KV, BLOCK, DIM))
            setattr(layer, name, _native.KvTarget(pool.data_ptr(), *pool.stride()[:3]))
        layer.routing = _native.Routing.SOFTMAX_THEN_PICK
        return layer

    def set_variant(self, slot: int, changed: Changed) -> None:
        variant = _native.Variant()
        for name in ("embedding", "head"):
            setattr(variant, name, self._change(changed, name))
        if "norm" in changed.replaced:
            variant.norm = self.norm(changed.replaced["norm"])
        for number in range(LAYERS):
            layer = _native.VariantLayer()
            for name in MATRICES:
                setattr(layer, name, self._change(changed, f"{number}.{name}"))
            for name in NORMS:
                if f"{number}.{name}" in changed.replaced:
                    setattr(layer, name, self.norm(changed.replaced[f"{number}.{name}"]))
            if f"{number}.sinks" in changed.replaced:
                layer.sinks = self.at(changed.replaced[f"{number}.sinks"])
            variant.add(layer)
        self.decoder.set_variant(slot, variant)
        self._keep(changed)
        tune = changed.experts
        addresses_E = np.full(EXPERTS, -1, dtype=np.int64)
        if tune is not None:
            addresses_E[:] = [plane.data_ptr() for plane in tune.planes]
            addresses_E[0] = -1  # this expert has not changed
        spec = None if tune is None else tune.spec
        self._keep(addresses_E)
        for known in self._experts_known:
            empty = _native.make_expert_delta(None, None, 0, 0)
            shape = empty if spec is None else native_expert_delta(spec)
            known.set_deltas(slot, shape, addresses_E.ctypes.data)

    def _change(self, changed: Changed, name: str) -> _native.Delta | _native.Weight | None:
        if name in changed.replaced:
            return self.weight(changed.replaced, name, plain=True)
        delta = changed.deltas.get(name)
        return None if delta is None else _native.Delta(native_delta(delta.region), delta.address)

    def begin(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int | None],
        starts: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        **changes: Any,
    ) -> int:
        """Begin a step with some tokens of each sequence, of the fine-tune in a slot; how many rows it has."""
        numbers = list(range(len(tokens))) if sequences is None else list(sequences)
        starts = [0] * len(tokens) if starts is None else starts
        runs, first = [], 0
        for each, slot in zip(tokens, slots, strict=True):
            if slot is not None:
                runs.append((slot, first, first + len(each)))
            first += len(each)
        table = torch.arange(BLOCKS, dtype=torch.int32).view(BLOCKS // 2, 2)
        listed = [token for each in tokens for token in each]
        of_row = [number for number, each in zip(numbers, tokens, strict=True) for _ in each]
        position = [start + i for start, each in zip(starts, tokens, strict=True) for i in range(len(each))]
        self.decoder.begin(
            token_ids=self.at(torch.tensor(listed)),
            rows=first,
            block_table=self.at(table),
            sequences=len(table),
            max_blocks=table.shape[1],
            row_sequence=self.at(torch.tensor(of_row, dtype=torch.int32)),
            row_position=self.at(torch.tensor(position, dtype=torch.int32)),
            **{"runs": runs, **changes},
        )
        return first

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        out_SV = torch.empty(len(rows), VOCABULARY)
        self.decoder.logits(self.at(torch.tensor(rows)), len(rows), out_SV.data_ptr())
        return out_SV

    def step(self, *args: Any, **changes: Any) -> torch.Tensor:
        """Logits of all rows of a step, whose experts are all in memory."""
        rows = self.begin(*args, **changes)
        reached = self.decoder.run(0)
        assert reached == LAYERS, "experts are known"
        return self.logits(range(rows))

    def finish(self, rows: int, reached: int) -> torch.Tensor:
        """Logits of all rows of a step of the base that has come back at the experts of a layer."""
        while reached < LAYERS:
            sum_TH, out_PH = torch.empty(rows, HIDDEN), torch.empty(rows * PICKS, HIDDEN)
            ids, weights = (one[reached * rows * PICKS :].data_ptr() for one in (self._ids, self._weights))
            known = self._experts_known[reached]
            assert known.covers(ids, rows, PICKS)
            assert known.run(self.hidden.data_ptr(), ids, weights, rows, PICKS, out_PH.data_ptr(), sum_TH.data_ptr())
            reached = self.decoder.run(self._keep(sum_TH).data_ptr())
        return self.logits(range(rows))
