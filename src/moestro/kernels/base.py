"""What a kernel does, whoever does it.

Shapes: T rows (tokens), K inputs, N outputs, H query heads (with experts: the hidden width), D key width, Dv that of
values, S sequences, E experts, J jobs (experts with rows), R rows of all jobs, P rows of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moestro.kernels.specs import ActivationSpec, ExpertDeltas, ExpertDeltaSpec, ExpertJobs, ExpertSpec, MatrixSpec
from moestro.quant.delta import DeltaRegion
from moestro.quant.low_rank import Region

if TYPE_CHECKING:
    from moestro import _native

__all__ = [
    "WEIGHT_DTYPES",
    "ActivationSpec",
    "DeltaRegion",
    "ExpertDeltaSpec",
    "ExpertDeltas",
    "ExpertJobs",
    "ExpertSpec",
    "Kernels",
    "MatrixSpec",
]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights and biases; their place in the tuple is the code that the native kernels know them by."""


class Kernels(Protocol):
    """The operations that everything expensive is made of.

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

    def experts(
        self,
        spec: ExpertSpec,
        jobs: ExpertJobs,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        deltas: ExpertDeltas | None = None,
    ) -> None:
        """The MLPs of any number of experts, each on its own rows and at its own level, from quantised planes.

        Row `jobs.rows[r]` of the hidden states goes through the MLP of its job; the result, not yet weighted, becomes
        row `jobs.places[r]` of `out_PH`. Both are fp32 and contiguous in their last dimension. A job's matrices are
        multiplied with all its rows at once; what `deltas` say is added to the results of its up and of its down
        projection, as by `add_delta`, so a row has the bits that it has with the deltas of others absent.

        Raises:
            ValueError: a job has an unknown level, lacks a plane that its level needs, or names a row that does not
                exist; a delta is on rows that are not its job's or have another, or has shapes that do not fit.
        """
        ...

    def known_experts(
        self, spec: ExpertSpec, planes_EP: NDArray[np.int64], levels: Sequence[int]
    ) -> _native.KnownExperts | None:
        """A layer's experts for compiled code to compute by itself; None where these kernels are not compiled.

        `planes_EP` are addresses as in jobs, 0 where they are not known; the array is looked at whenever the experts
        are used, and has to outlive them. With several levels each expert has a row for each of them.
        """
        ...

    def packed_linear(
        self,
        x_TK: torch.Tensor,
        matrix: MatrixSpec,
        planes: Sequence[int],
        level: int,
        bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`linear` with a quantised matrix: fp32 [T, N]. x and bias are fp32.

        Args:
            planes: addresses of the planes up to the level's (of a flat matrix: one).
            level: 2, 3, 4 or 8; of a flat matrix its bits.
        """
        ...

    def unpack(self, matrix: MatrixSpec, planes: Sequence[int], level: int) -> torch.Tensor:
        """The values that a quantised matrix stands for at a level, fp32 [N, K]."""
        ...

    def packed_rows(self, matrix: MatrixSpec, planes: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        """Rows of a flat matrix (an embedding), fp32 [R, K], from ids int64 [R]. ValueError when an id is not a row."""
        ...

    def add_delta(self, x_TK: torch.Tensor, delta: Region, address: int, out_TN: torch.Tensor) -> None:
        """`out_TN += x_TK @ delta.T`, then the difference of the biases, if there is one. All fp32.

        x is quantised as for a packed matrix, whatever the matrix of the base is. The codes give t as `packed_linear`
        does, salient channels in ascending order add to it (t = fma(scale * code of the activation, value, t)), then
        out = out + t, and last out = out + bias.

        With a low-rank delta t is two products of `linear`: with the right vectors, then with the left ones.

        Args:
            x_TK: contiguous in its last dimension, like `out_TN`.
            delta: where the parts of the delta lie from `address` on.
            address: 64-byte aligned.
        """
        ...

    def add_delta_rows(self, delta: Region, address: int, ids: torch.Tensor, out_RK: torch.Tensor) -> None:
        """Rows of a delta (of an embedding), from ids int64 [R], are added to `out_RK` (fp32, contiguous).

        ValueError when an id is not a row.
        """
        ...

    def unpack_delta(self, delta: Region, address: int) -> torch.Tensor:
        """What the bytes of a delta stand for, fp32 [N, K]; without the biases."""
        ...
