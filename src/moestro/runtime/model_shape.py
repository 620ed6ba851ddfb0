"""Sizes of a model, from a store or from a skeleton alone: what a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moestro.bit_router import stored_bit_router_bytes
from moestro.hf.linears import lookup_names
from moestro.hf.skeleton import Skeleton
from moestro.runtime.expert_spec import is_raw
from moestro.runtime.foresight import stored_nets_bytes
from moestro.store.layout import Layout
from moestro.store.reader import Store


@dataclass(frozen=True)
class Sizes:
    """Bytes that are the same at every level: of dense weights, of them those of a matrix of which only rows are looked
    up, of the learned predictor that comes with the model, and of its bit router."""

    dense_bytes: int
    lookup_bytes: int
    nets_bytes: int
    bit_router_bytes: int = 0

    @classmethod
    def of_store(cls, store: Store, skeleton: Skeleton) -> Sizes:
        """Of a store as it is now."""
        return cls(
            dense_bytes=store.dense_file.stat().st_size,
            lookup_bytes=sum(store.dense[name].nbytes for name in lookup_names(skeleton)),
            nets_bytes=stored_nets_bytes(store.path),
            bit_router_bytes=stored_bit_router_bytes(store.path),
        )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model at a level, from a store or from a skeleton.

    `chains[i]` are the bytes of the planes of one expert of MoE layer i, up to the level. `packed` are the inputs of
    the widest up projection, down projection and dense matrix where weights are quantised (None where they are not).
    `lookup_bytes` of the dense bytes are a matrix of which only rows are looked up, `lookup_row_bytes` each.
    `nets_bytes` are those of the learned predictor that comes with it, `bit_router_bytes` those of its bit router, used
    or not.
    """

    name: str
    dense_bytes: int
    chains: tuple[tuple[int, ...], ...]
    experts: tuple[int, ...]
    level: int
    packed: tuple[int, int, int] | None = None
    nets_bytes: int = 0
    bit_router_bytes: int = 0
    lookup_bytes: int = 0
    lookup_row_bytes: int = 0

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        *,
        name: str,
        sizes: Sizes,
        layouts: Sequence[Layout],
        level: int,
    ) -> ModelShape:
        """The shape of a model whose MoE layers have these layouts, which end at the plane of `level`."""
        return cls(
            name=name,
            dense_bytes=sizes.dense_bytes,
            lookup_bytes=sizes.lookup_bytes,
            lookup_row_bytes=max(
                (sizes.lookup_bytes // skeleton.dense[name][0][0] for name in lookup_names(skeleton)), default=0
            ),
            chains=tuple(tuple(plane.nbytes for plane in layout.planes) for layout in layouts),
            experts=tuple(layer.num_experts for layer in skeleton.expert_layers),
            level=level,
            packed=None if all(is_raw(layout) for layout in layouts) else _widths(skeleton),
            nets_bytes=sizes.nets_bytes,
            bit_router_bytes=sizes.bit_router_bytes,
        )

    @property
    def bytes_per_expert(self) -> tuple[int, ...]:
        """Bytes of one expert of each MoE layer."""
        return tuple(sum(chain) for chain in self.chains)

    @property
    def plane_sizes(self) -> tuple[int, ...]:
        """The slot classes of an arena for this model, ascending."""
        return tuple(sorted({size for chain in self.chains for size in chain}))

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(size * count for size, count in zip(self.bytes_per_expert, self.experts, strict=True))


def _widths(skeleton: Skeleton) -> tuple[int, int, int]:
    params = [param for layer in skeleton.expert_layers for param in layer.params if len(param.shape) == 2]
    down = [param.shape[1] for param in params if param.name == "down_proj"]
    up = [param.shape[1] for param in params if param.name != "down_proj"]
    return max(up), max(down), max(shape[1] for shape, _ in skeleton.dense.values() if len(shape) == 2)
