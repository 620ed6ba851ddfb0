"""Measures this machine once: its disk, its memory, its kernels; says what that means for moestro."""

from __future__ import annotations

from moestro.doctor.diagnosis import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
