"""A variant as the compiled decoder knows it: what it changes in each layer, by address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moestro import _native
from moestro.kernels.shapes import native_delta
from moestro.quant.low_rank import flat_region
from moestro.runtime.delta_weight import DeltaWeight
from moestro.runtime.native.blueprint import Blueprint, LayerParts
from moestro.runtime.native.weights import floats, norm_of, weight_of


class Changes:
    """Finds what a variant has in the place of a module's own tensors; `changed` are by the id of these."""

    def __init__(self, changed: Mapping[int, torch.Tensor]) -> None:
        self._changed = changed

    def matrix(self, module: Any) -> _native.Delta | _native.Weight | None:
        """Of a linear map or an embedding: what is added to it, or what replaces it and its bias; None: nothing."""
        bias = getattr(module, "bias", None)
        own, own_bias = self._changed.get(id(module.weight)), None if bias is None else self._changed.get(id(bias))
        if isinstance(own, DeltaWeight):
            assert own_bias is None, "a bias that changes with its matrix is in the delta"
            return _native.Delta(native_delta(flat_region(own.region)), own.address)
        if own is None and own_bias is None:
            return None
        return weight_of(module.weight if own is None else own, bias if own_bias is None else own_bias)

    def norm(self, module: Any) -> _native.Norm | None:
        """Of a norm."""
        own = self._changed.get(id(module.weight))
        return None if own is None else norm_of(own, module)

    def vector(self, own: torch.Tensor) -> int | None:
        """The address of what takes the place of a vector."""
        changed = self._changed.get(id(own))
        return None if changed is None else floats(changed)


def native_variant(blueprint: Blueprint, changes: Changes) -> _native.Variant:
    """The variant, for `Decoder.set_variant`."""
    variant = _native.Variant()
    variant.embedding, variant.head = changes.matrix(blueprint.embedding), changes.matrix(blueprint.head)
    if (norm := changes.norm(blueprint.norm)) is not None:
        variant.norm = norm
    for parts in blueprint.layers:
        variant.add(_layer(parts, changes))
    return variant


def _layer(parts: LayerParts, changes: Changes) -> _native.VariantLayer:
    layer, attention = _native.VariantLayer(), parts.attention
    norms = {"input_norm": parts.input_norm, "post_norm": parts.post_norm}
    matrices: dict[str, Any] = {"q": attention.q, "k": attention.k, "v": attention.v, "o": attention.o}
    if attention.q_norm is not None and attention.k_norm is not None:
        norms |= {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
    if parts.mlp is not None:
        matrices |= {"gate": parts.mlp.gate, "up": parts.mlp.up, "down": parts.mlp.down}
        if parts.mlp.scale is not None:
            matrices["scale"] = parts.mlp.scale
    if parts.router is not None:
        matrices["router"] = parts.router
    for name, module in matrices.items():
        setattr(layer, name, changes.matrix(module))
    for name, module in norms.items():
        if (norm := changes.norm(module)) is not None:
            setattr(layer, name, norm)
    if attention.sinks_owner is not None:
        sinks: Any = attention.sinks_owner.sinks
        if (address := changes.vector(sinks)) is not None:
            layer.sinks = address
    return layer
