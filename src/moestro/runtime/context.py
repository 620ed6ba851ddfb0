"""What the functions that transformers calls back need to know of the forward pass that is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn


class ForwardContext(Protocol):
    """One forward pass: the runner's real one, or the probe's on the meta device."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention output [T, H, V] of one layer."""

    def check_mask(self, mask_function: Any, window: int) -> None:
        """Refuse attention patterns that are neither causal nor a causal window."""

    def experts(
        self, module: nn.Module, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Output [T, H] of one layer's routed experts."""


class AttentionCall:
    """One call of the attention interface, shapes as transformers passes them: query [1, H, T, D], keys, values alike.

    `window` is the sliding window in rows (0: none).
    """

    __slots__ = ("extras", "key", "module", "query", "scale", "sinks_H", "softcap", "value", "window")

    def __init__(
        self,
        *,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks_H: torch.Tensor | None,
        extras: dict[str, Any],
    ) -> None:
        self.module, self.query, self.key, self.value = module, query, key, value
        self.scale, self.window, self.softcap, self.sinks_H, self.extras = scale, window, softcap, sinks_H, extras


_current: ContextVar[ForwardContext] = ContextVar("moestro_forward")


@contextmanager
def forward_pass(context: ForwardContext) -> Iterator[None]:
    """Make `context` the one that the hooks find."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> ForwardContext:
    """The forward pass under way."""
    return _current.get()
