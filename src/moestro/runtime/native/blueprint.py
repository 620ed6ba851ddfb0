"""What a decoder consists of, as modules whose weights may still be on the meta device, and what a step of it needs.

Shapes: T rows, H hidden width, K experts per token, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moestro import _native
from moestro.quant.groups import group_size
from moestro.runtime.experts import KNOWN_ROWS

_FLOAT = 4


@dataclass(frozen=True)
class MlpParts:
    """`down(silu(gate(x)) * up(x))`, times the sigmoid of `scale(x)` where there is one."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    scale: nn.Linear | None = None


@dataclass(frozen=True)
class AttentionParts:
    """Attention of one layer. Norms are over a head or over the whole row; `clip` limits what is cached."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    clip: float
    heads: int
    heads_kv: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    sinks_owner: nn.Module | None


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: norm, attention, norm, then an MLP, routed experts, or both (a shared expert)."""

    input_norm: nn.Module
    attention: AttentionParts
    post_norm: nn.Module
    mlp: MlpParts | None
    router: nn.Module | None
    routing: _native.Routing
    experts: nn.Module | None


@dataclass(frozen=True)
class Blueprint:
    """A decoder. `experts_per_token` is the same in all of its MoE layers."""

    embedding: nn.Embedding
    rotary: nn.Module
    layers: tuple[LayerParts, ...]
    norm: nn.Module
    head: nn.Linear
    hidden: int
    experts_per_token: int

    @property
    def moe_layers(self) -> int:
        """How many layers have routed experts."""
        return sum(layer.experts is not None for layer in self.layers)

    @property
    def scratch_width(self) -> int:
        """Floats per row that a layer needs beside the residual and the normed hidden state."""
        return max(_scratch_width(layer, self.hidden) for layer in self.layers)

    def quantised_size(self, rows: int) -> int:
        """Most bytes of `rows` quantised rows, wherever weights are quantised."""
        attention = [layer.attention.o.in_features for layer in self.layers]
        inner = [layer.mlp.down.in_features for layer in self.layers if layer.mlp is not None]
        widths = {self.hidden, *attention, *inner}
        return max(_native.quantised_bytes(rows, width, group_size(width)) for width in widths)

    def workspace_bytes(self, rows: int) -> int:
        """Bytes of the buffers that a step of `rows` tokens uses."""
        routing = self.moe_layers * self.experts_per_token * (8 + _FLOAT)
        floats = _FLOAT * (2 * self.hidden + self.scratch_width)
        outputs = _FLOAT * known_rows(rows) * self.experts_per_token * self.hidden
        return rows * (floats + routing) + outputs + self.quantised_size(rows)

    def activation_bytes(self, *, rows: int, context: int, logit_rows: int, experts_bytes: int) -> int:
        """Most bytes at once in a step, of which one layer's routed experts take `experts_bytes`.

        The angles of every position in the context are kept as well: half a head's width of cosines and of sines.
        """
        rotation = _FLOAT * context * self.layers[0].attention.head_dim
        delta = _FLOAT * rows * self.hidden
        logits = _FLOAT * logit_rows * self.head.out_features
        return self.workspace_bytes(rows) + rotation + delta + max(experts_bytes, logits)


def known_rows(rows: int) -> int:
    """Most rows of a step whose experts the decoder computes itself, where no step has more than `rows`."""
    return min(rows, KNOWN_ROWS)


def _scratch_width(layer: LayerParts, hidden: int) -> int:
    attention = layer.attention
    widths = [(attention.heads + 2 * attention.heads_kv) * attention.head_dim]
    if layer.mlp is not None:
        inner = layer.mlp.gate.out_features
        widths.append(inner + max(inner, hidden) + 1)
    if layer.experts is not None:
        widths.append(int(layer.experts.num_experts))  # type: ignore[arg-type]
    return max(widths)
