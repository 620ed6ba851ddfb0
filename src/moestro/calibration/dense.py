"""The inputs of dense linear maps while calibration runs, for those whose codes are found with their help.

Shapes: T rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moestro.errors import PackError
from moestro.quant.hessian import gram
from moestro.runtime.narrow import plain
from moestro.store.dense_file import FLAT_BITS
from moestro.store.pack_plan import PackPlan


def calibrated_units(plan: PackPlan) -> dict[str, int]:
    """The dense tensors that inputs help to quantise, by name: those of 4 bits. Eight bits lose next to nothing."""
    return {
        place.spec.name: unit
        for unit, place in enumerate(plan.dense.places)
        if FLAT_BITS.get(place.spec.dtype) == 4  # flat tensors are weights of linear maps
    }


class DenseInputs:
    """Sums over all rows x that reach the linear maps of a model of x x^T, since they were last taken.

    `units` are numbers by the names of the maps' weights. A weight that two modules share counts the rows of the linear
    one.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, int]) -> None:
        self._hessians: dict[int, torch.Tensor] = {}
        unit_of = {}
        state = model.state_dict(keep_vars=True)
        for name, unit in units.items():
            unit_of[id(state[name])] = unit
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in unit_of:
                self._watch(module, unit_of[id(module.weight)])

    def take(self) -> dict[int, torch.Tensor]:
        """Sums [K, K] by unit. Maps that no row has reached are left out.

        Raises:
            PackError: the inputs are not numbers.
        """
        taken, self._hessians = self._hessians, {}
        for hessian_KK in taken.values():
            if not bool(hessian_KK.isfinite().all()):
                raise PackError(
                    "The model's hidden states before a dense linear map are not numbers: fp32 cannot hold them, or "
                    "the checkpoint is damaged. Download or copy it again, or pack with --no-calibration."
                )
        return taken

    def _watch(self, module: nn.Linear, unit: int) -> None:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows_TK = plain(args[0]).reshape(-1, args[0].shape[-1]).float()
            product_KK = gram(rows_TK)
            if unit in self._hessians:
                self._hessians[unit] += product_KK
            else:
                self._hessians[unit] = product_KK

        module.register_forward_pre_hook(add)
