"""Weights as codes of few bits: nested encodings for experts, flat ones for dense matrices."""

from __future__ import annotations

from moestro.quant.codes import LEVELS
from moestro.quant.encoding import Encoding
from moestro.quant.nested import NestedEncoding
from moestro.quant.signs import SignsEncoding

__all__ = ["ENCODINGS", "LEVELS", "Encoding", "NestedEncoding", "make_encoding"]

ENCODINGS: dict[str, type[Encoding]] = {"nested": NestedEncoding, "signs": SignsEncoding}


def make_encoding(name: str) -> Encoding:
    """An encoding by name. Raises ValueError, naming those there are."""
    maker = ENCODINGS.get(name)
    if maker is None:
        raise ValueError(f"There is no encoding named {name!r}. Expected one of: {', '.join(ENCODINGS)}.")
    return maker()
