"""What kernels are told of a layer's experts, from the store's layout and transformers' experts module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from moestro.kernels.base import ExpertSpec, MatrixSpec
from moestro.kernels.specs import Encoding
from moestro.runtime.activation import find_activation
from moestro.store.layout import Layout, TensorLayout


@dataclass(frozen=True)
class ExpertMatrices:
    """The two projections of a layer's experts and the byte offsets of their biases in plane 0 (None: no bias)."""

    up: MatrixSpec
    down: MatrixSpec
    up_bias: int | None
    down_bias: int | None


def is_raw(layout: Layout) -> bool:
    """Whether experts are stored as they were, not quantised."""
    return layout.planes[0].kind == "raw"


def expert_matrices(layout: Layout) -> ExpertMatrices:
    """Where the matrices and biases of a quantised expert lie in its planes (those of `layout`, which may be cut)."""
    base = {tensor.name: tensor for tensor in layout.planes[0].tensors}
    up = "gate_up_proj" if "gate_up_proj" in base else "up_proj"
    return ExpertMatrices(
        up=_matrix(layout, up),
        down=_matrix(layout, "down_proj"),
        up_bias=_offset(base.get(f"{up}_bias")),
        down_bias=_offset(base.get("down_proj_bias")),
    )


def expert_spec(matrices: ExpertMatrices, module: nn.Module) -> ExpertSpec | None:
    """The whole MLP for the kernels; None when they do not know the module's activation."""
    found = find_activation(module)
    if found is None:
        return None
    gate, activation = found
    return ExpertSpec(
        up=matrices.up,
        down=matrices.down,
        up_bias=matrices.up_bias,
        down_bias=matrices.down_bias,
        gate=gate,
        activation=activation,
    )


def _matrix(layout: Layout, name: str) -> MatrixSpec:
    regions = [next(tensor for tensor in plane.tensors if tensor.name == name) for plane in layout.planes]
    rows, columns = regions[0].shape
    group: Any = regions[0].group_size
    return MatrixSpec(
        encoding=cast(Encoding, regions[0].dtype),
        rows=rows,
        columns=columns,
        group=group,
        offsets=tuple(region.offset for region in regions),
    )


def _offset(tensor: TensorLayout | None) -> int | None:
    return None if tensor is None else tensor.offset
