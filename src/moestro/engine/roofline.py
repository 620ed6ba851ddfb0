"""What a step costs at the least: its true bytes and products at the speeds that the machine was measured at.

Reading the disk, reading memory and computing can all go on at once, so a step takes at least as long as the longest of
the three; nobody can overlap more than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moestro.hf.linears import lookup_names
from moestro.hf.skeleton import Skeleton
from moestro.runtime.plan import Plan
from moestro.runtime.probe import probe
from moestro.store.reader import Store


@dataclass(frozen=True)
class Machine:
    """Bytes per second from memory and from disk, products of a weight and an input per second."""

    memory_bandwidth: float
    disk_bandwidth: float
    multiplications_per_s: float


@dataclass(frozen=True)
class Work:
    """What forward passes had to do: bytes read from memory and from disk, products."""

    memory_bytes: float
    disk_bytes: float
    multiplications: float


@dataclass(frozen=True)
class Bound:
    """The least seconds of some work by each of its parts; `by` names the longest."""

    memory_s: float
    disk_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.disk_s, self.compute_s)

    @property
    def by(self) -> str:
        parts = {"memory": self.memory_s, "disk": self.disk_s, "compute": self.compute_s}
        return max(parts, key=lambda name: parts[name])


def bound_of(work: Work, machine: Machine) -> Bound:
    """The least time that `work` takes."""
    return Bound(
        memory_s=work.memory_bytes / machine.memory_bandwidth,
        disk_s=work.disk_bytes / machine.disk_bandwidth,
        compute_s=work.multiplications / machine.multiplications_per_s,
    )


@dataclass(frozen=True)
class LayerCosts:
    """Attention of a layer: `window` in rows (0: none), bytes of a cached row, products of a row with a cached one."""

    window: int
    row_bytes: int
    multiplications: int

    def reach(self, length: int) -> int:
        """How many cached rows a row sees, itself included, in a sequence of `length` rows that ends with it."""
        return min(length, self.window) if self.window else length


@dataclass(frozen=True)
class Costs:
    """What a model takes in bytes and products.

    Attributes:
        dense_bytes: dense weights that every step reads once (of an embedding only rows are looked up).
        chain_bytes: planes of one expert up to the level, on average.
        row_multiplications: of one row in all matrices but the head.
        head_multiplications: of one row that gets logits.
        layers: attention.
    """

    dense_bytes: int
    chain_bytes: float
    row_multiplications: int
    head_multiplications: int
    layers: tuple[LayerCosts, ...]

    @classmethod
    def of(cls, store: Store, skeleton: Skeleton, plan: Plan) -> Costs:
        """Those of an open model."""
        probed = probe(skeleton, rows=2, history=2, logit_rows=1)
        model: Any = skeleton.model
        state = model.state_dict(keep_vars=True)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
        looked_up = lookup_names(skeleton)
        matrices = sum(
            math.prod(shape)
            for name, (shape, _) in skeleton.dense.items()
            if len(shape) == 2 and state[name] is not embedding and state[name] is not head.weight
        )
        experts = sum(
            picks * sum(math.prod(param.shape) for param in layer.params if len(param.shape) == 2)
            for picks, layer in zip(probed.experts_per_token, skeleton.expert_layers, strict=True)
        )
        heads = int(skeleton.config.num_attention_heads)
        return cls(
            dense_bytes=sum(one.nbytes for name, one in store.dense.items() if name not in looked_up),
            chain_bytes=plan.expert_bytes / plan.total_experts,
            row_multiplications=matrices + experts,
            head_multiplications=head.weight.numel(),
            layers=tuple(
                LayerCosts(
                    call.window,
                    4 * (kv.heads * kv.key_width + kv.value_heads * kv.value_width),
                    heads * (kv.key_width + kv.value_width),
                )
                for call, kv in zip(probed.attention, probed.kv_layers, strict=True)
            ),
        )

    def work(
        self, chunks: Sequence[tuple[int, int]], *, steps: int, logit_rows: int, experts: int, disk_bytes: int
    ) -> Work:
        """The work of `steps` forward passes that computed so many experts and read so much from disk.

        `chunks` are the positions (first, last + 1) that each sequence appended in each step: it reads what is cached
        of the sequence once, and its rows see what is before them.
        """
        cached = sum(
            layer.row_bytes * (layer.reach(last) if last - first == 1 else last)
            for layer in self.layers
            for first, last in chunks
        )
        seen = sum(
            layer.multiplications * sum(layer.reach(row + 1) for row in range(first, last))
            for layer in self.layers
            for first, last in chunks
        )
        rows = sum(last - first for first, last in chunks)
        return Work(
            memory_bytes=steps * self.dense_bytes + experts * self.chain_bytes + cached,
            disk_bytes=disk_bytes,
            multiplications=rows * self.row_multiplications + logit_rows * self.head_multiplications + seen,
        )
