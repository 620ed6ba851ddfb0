"""The Hessian of a linear map's output error, made fit for rounding.

Shapes: K columns (inputs).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from moestro.quant.rounding import Compensation

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""


def importance(hessian_KK: torch.Tensor | None, columns: int) -> torch.Tensor:
    """How much an error in each column matters, [columns]; all alike without a Hessian or with an empty one."""
    if hessian_KK is None or not bool(hessian_KK.any()):
        return torch.ones(columns)
    diagonal_K = hessian_KK.diagonal().float()
    importance_K = diagonal_K / diagonal_K.mean() + DAMPING
    return functional.pad(importance_K, (0, columns - len(importance_K)), value=DAMPING)


def compensation(hessian_KK: torch.Tensor | None, columns: int) -> Compensation | None:
    """How errors are pushed on: columns of great importance first. None without a Hessian, or with an empty one."""
    if hessian_KK is None or not bool(hessian_KK.any()):
        return None
    extra = columns - len(hessian_KK)
    damped_KK = functional.pad(hessian_KK.double(), (0, extra, 0, extra))
    damped_KK.diagonal().add_(float(hessian_KK.diagonal().double().mean()) * DAMPING)
    order_K = damped_KK.diagonal().argsort(descending=True, stable=True)
    damped_KK = damped_KK[order_K][:, order_K]
    return Compensation(order_K, damped_KK.float().contiguous(), _inverse_root(damped_KK).float().contiguous())


def _inverse_root(matrix_KK: torch.Tensor) -> torch.Tensor:
    """Upper triangular R with R^T R the inverse of a positive definite matrix.

    Turned around, the lower Cholesky factor is an upper U with U U^T the matrix, and R is U's inverse: no inverse of
    the whole matrix is needed.
    """
    upper_KK = torch.linalg.cholesky(matrix_KK.flip(0, 1)).flip(0, 1)
    identity_KK = torch.eye(len(matrix_KK), dtype=matrix_KK.dtype)
    root_KK: torch.Tensor = torch.linalg.solve_triangular(upper_KK, identity_KK, upper=True)
    return root_KK
