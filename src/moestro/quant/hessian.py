"""The Hessian of a linear map's output error, made fit for rounding.

Shapes: T rows of inputs, K columns (inputs).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from moestro.quant.rounding import Compensation

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""


_STRIPE = 512


def gram(rows_TK: torch.Tensor) -> torch.Tensor:
    """X^T X [K, K] of rows X, of which half is computed and the other half copied."""
    columns = rows_TK.shape[1]
    product_KK = rows_TK.new_empty((columns, columns))
    for start in range(0, columns, _STRIPE):
        stripe = slice(start, min(start + _STRIPE, columns))
        product_KK[stripe, start:] = rows_TK[:, stripe].T @ rows_TK[:, start:]
        product_KK[stripe.stop :, stripe] = product_KK[stripe, stripe.stop :].T
    return product_KK


def importance(hessian_KK: torch.Tensor | None, columns: int) -> torch.Tensor:
    """How much an error in each column matters, [columns]; all alike without a Hessian or with an empty one."""
    if hessian_KK is None or not bool(hessian_KK.any()):
        return torch.ones(columns)
    diagonal_K = hessian_KK.diagonal().float()
    importance_K = diagonal_K / diagonal_K.mean() + DAMPING
    return functional.pad(importance_K, (0, columns - len(importance_K)), value=DAMPING)


def damped(matrix_KK: torch.Tensor, size: int, share: float) -> torch.Tensor:
    """In float64, padded with zeros to [size, size], `share` of the mean diagonal added to all of the diagonal."""
    extra = size - len(matrix_KK)
    damped_KK = functional.pad(matrix_KK.double(), (0, extra, 0, extra))
    damped_KK.diagonal().add_(float(matrix_KK.diagonal().double().mean()) * share)
    return damped_KK


def compensation(hessian_KK: torch.Tensor | None, columns: int) -> Compensation | None:
    """How errors are pushed on: columns of great importance first. None without a Hessian, or with an empty one."""
    if hessian_KK is None or not bool(hessian_KK.any()):
        return None
    damped_KK = damped(hessian_KK, columns, DAMPING)
    order_K = damped_KK.diagonal().argsort(descending=True, stable=True)
    damped_KK = damped_KK[order_K][:, order_K]
    return Compensation(order_K, damped_KK.float().contiguous(), feedback(damped_KK).float().contiguous())


def feedback(matrix_KK: torch.Tensor) -> torch.Tensor:
    """The upper triangular M, of ones on the diagonal, with M D M^T the positive definite matrix.

    For errors e in row form, e M D M^T e^T is a sum over columns of D times the square of e plus what M makes of the
    errors in the columns before.
    """
    # Turned around, the lower Cholesky factor is an upper one.
    upper_KK = torch.linalg.cholesky(matrix_KK.flip(0, 1)).flip(0, 1)
    feedback_KK: torch.Tensor = upper_KK / upper_KK.diagonal()
    return feedback_KK
