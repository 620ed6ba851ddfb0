"""Tensor views into the arena's slots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moestro.store.layout import Layout

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class SlotViews:
    """The tensors of an expert, by layer and slot offset; made once per slot, since slots are reused all the time."""

    def __init__(self, *, arena_bytes: torch.Tensor, layouts: Sequence[Layout]) -> None:
        self._arena = arena_bytes
        self._layouts = tuple(layouts)
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        distinct = list(dict.fromkeys(layouts))
        self._layout_number = [distinct.index(layout) for layout in layouts]

    def at(self, layer: int, offset: int) -> dict[str, torch.Tensor]:
        """Tensors of the base plane that lies at byte `offset` of the arena, by name, in canonical layout."""
        key = (self._layout_number[layer], offset)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._make(layer, offset)
        return views

    def _make(self, layer: int, offset: int) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        for tensor in self._layouts[layer].planes[0].tensors:
            start = offset + tensor.offset
            dtype = DTYPES[tensor.dtype]
            flat = self._arena[start : start + math.prod(tensor.shape) * dtype.itemsize]
            views[tensor.name] = flat.view(dtype).view(tensor.shape)
        return views
