"""Kernels by name."""

from __future__ import annotations

import sys

import pytest

from moestro.errors import MoestroError
from moestro.kernels import KERNELS, make_kernels


@pytest.mark.parametrize(("name", "made"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_kernels_by_name(name: str, made: str) -> None:
    assert make_kernels(name, threads=1).name == made


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"'triton'.*{', '.join(KERNELS)}"):
        make_kernels("triton", threads=1)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_missing_native_module_says_how_to_build_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moestro.kernels.cpu", raising=False)
    monkeypatch.delattr("moestro._native")
    monkeypatch.setitem(sys.modules, "moestro._native", None)
    with pytest.raises(MoestroError, match="pip install"):
        make_kernels(name, threads=1)
