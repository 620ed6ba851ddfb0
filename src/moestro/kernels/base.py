"""What a kernel does, whoever does it.

Shapes: T rows (tokens), K inputs, N outputs, H query heads, D key width, Dv value width, S sequences.
"""

from __future__ import annotations

from typing import Protocol

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights and biases; their place in the tuple is the code that the native kernels know them by."""


class Kernels(Protocol):
    """The two operations that everything expensive is made of.

    Implementations used for serving keep the exactness rule: an element of the result depends on its own row's inputs
    alone, through one fixed order of fp32 operations, so it has the same bits whatever the other rows, their number
    and the number of threads.
    """

    @property
    def name(self) -> str:
        """The name that `make_kernels` knows it by."""
        ...

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """`x_TK @ weight_NK.T + bias_N` in fp32, shape [T, N].

        x is fp32; weight and bias are fp32, bf16 or fp16 and are converted exactly; the bias is added last.
        """
        ...

    def attention(
        self,
        query_THD: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        block_table: torch.Tensor,
        row_sequence: torch.Tensor,
        row_position: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of rows to the keys and values of their own sequences, fp32, shape [T, H, Dv].

        Row t attends to positions `max(0, p - window + 1) .. p` of sequence `row_sequence[t]`, where p is
        `row_position[t]` (no lower end when window is 0). Position j of a sequence lies in block
        `block_table[sequence, j // block_size]`, at `j % block_size`. Query head h reads key-value head
        `h // (H // heads_kv)`.

        Args:
            query_THD: fp32.
            key_pool: fp32 [blocks, heads_kv, block_size, D], any strides with the innermost 1.
            value_pool: fp32 [blocks, heads_kv, block_size, Dv], likewise.
            block_table: int32 [S, max_blocks]; entries that no row needs may hold anything.
            row_sequence: int32 [T].
            row_position: int32 [T].
            scale: factor of the dot products.
            window: how many positions a row sees, its own included; 0 for all.
            softcap: when not 0, scores become `softcap * tanh(score / softcap)`.
            sinks_H: fp32, one more logit per head that takes probability and has no value (gpt-oss).

        Raises:
            ValueError: a row's sequence, position or block lies outside the table or the pool.
        """
        ...
