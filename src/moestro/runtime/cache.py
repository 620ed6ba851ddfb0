"""The face of the KV cache that transformers' layers see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moestro.errors import UnsupportedModelError
from moestro.hf.bridge import Cache

CacheRows = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(keys [1, H, T, D], values [1, H, T, V], layer) -> what the layer goes on with."""


class HookedCache(Cache):
    """Hands new rows to `cache_rows`. Lengths are none of its business: positions and masks come with the batch."""

    def __init__(self, family: str, cache_rows: CacheRows) -> None:
        super().__init__(layers=[])
        self._family = family
        self._cache_rows = cache_rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No rows, as far as a layer has to know."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """No offset, as far as a mask has to know."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of the mask, which is never built."""
        return query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **extras: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new rows."""
        return self._cache_rows(key_states, value_states, layer_idx)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(
            f"{self._family} has recurrent, linear or indexed attention layers, whose state moestro does not keep per "
            "sequence yet."
        )

    has_previous_state = get_conv_state = update_conv_state = _refuse
    get_recurrent_state = update_recurrent_state = update_indexer = _refuse
