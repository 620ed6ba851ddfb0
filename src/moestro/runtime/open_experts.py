"""From a model without experts and the layouts of their planes: what computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moestro.hf.skeleton import Skeleton, is_experts_module
from moestro.kernels.base import Kernels
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.runtime.expert_layers import LayerExperts, RawExperts, packed_layer
from moestro.runtime.expert_spec import is_raw
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.slots import SlotViews
from moestro.store.layout import Layout


def open_experts(
    *,
    skeleton: Skeleton,
    kernels: Kernels,
    planes: PlaneCache,
    layouts: Sequence[Layout],
    level: int,
    arena: torch.Tensor,
) -> RoutedExperts:
    """The experts of a model at a level.

    Args:
        layouts: of each MoE layer, up to the planes of `level`.
        arena: the bytes in which `planes` holds planes.
    """
    views = SlotViews(arena_bytes=arena, layouts=layouts)
    modules = [module for module in skeleton.model.modules() if is_experts_module(module)]
    layers: list[LayerExperts] = []
    chains: list[list[Chain]] = []
    for layer, (module, layout) in enumerate(zip(modules, layouts, strict=True)):
        experts = range(skeleton.expert_layers[layer].num_experts)
        chains.append([tuple((layer, expert, plane) for plane in range(len(layout.planes))) for expert in experts])
        if is_raw(layout):
            layers.append(RawExperts(kernels, module, views, layer))
        else:
            layers.append(packed_layer(kernels, module, layout, arena, level=level, experts=len(experts), layer=layer))
    return RoutedExperts(planes, layers, chains, level=level, arena=arena.data_ptr())
