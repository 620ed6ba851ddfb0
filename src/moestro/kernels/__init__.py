"""Kernels by name: `cpu` (compiled), `reference` (plain torch, the oracle)."""

from __future__ import annotations

from collections.abc import Callable

from moestro.errors import MoestroError
from moestro.kernels.base import Kernels
from moestro.kernels.reference import ReferenceKernels

__all__ = ["KERNELS", "Kernels", "make_kernels"]


def _make_cpu(threads: int) -> Kernels:
    try:
        from moestro.kernels.cpu import CpuKernels
    except ImportError as error:
        raise MoestroError(
            f"The compiled kernels cannot be loaded ({error}). Expected the extension module moestro._native, which "
            "installing builds: run `pip install .` in moestro's source folder (it needs a C++17 compiler and CMake)."
        ) from error
    return CpuKernels(threads=threads)


def _make_reference(threads: int) -> Kernels:
    del threads  # torch has a thread count of its own
    return ReferenceKernels()


KERNELS: dict[str, Callable[[int], Kernels]] = {"auto": _make_cpu, "cpu": _make_cpu, "reference": _make_reference}
"""Makers by name, each given the number of threads. `auto` is `cpu`: the reference is never taken silently."""


def make_kernels(name: str, *, threads: int) -> Kernels:
    """Kernels by name, on `threads` threads (the caller included).

    Raises:
        ValueError: no kernels have that name, or `threads` is not from 1 to 1024.
        MoestroError: the compiled kernels are asked for and are not there.
    """
    maker = KERNELS.get(name)
    if maker is None:
        raise ValueError(f"There are no kernels named {name!r}. Expected one of: {', '.join(KERNELS)}.")
    return maker(threads)
