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
    root_KK = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_KK)), upper=True)
    return Compensation(order_K, damped_KK.float().contiguous(), root_KK.float().contiguous())
