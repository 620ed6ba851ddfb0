"""Packing with a look at a text: which errors of the codes matter is told by what flows through the model."""

from __future__ import annotations

from moestro.calibration.apart import pack_apart
from moestro.calibration.packing import pack

__all__ = ["pack", "pack_apart"]
