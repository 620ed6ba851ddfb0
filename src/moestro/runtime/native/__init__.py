"""The native path: a decoder layer of a family that we know is one call of the compiled module, up to its experts.

transformers' eager layers cost more in Python than a small model's matrices take. `families.describe` looks at a
model's module tree and config and says what each layer consists of, or that it does not know the model well enough:
that model runs on the general path (transformers' own forward with our hooks). `forward.NativeForward` runs the others.
"""

from __future__ import annotations

from moestro.runtime.native.blueprint import Blueprint
from moestro.runtime.native.families import describe
from moestro.runtime.native.forward import NativeForward

__all__ = ["Blueprint", "NativeForward", "describe"]
