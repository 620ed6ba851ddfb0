"""Which of a store's levels a model is served at, and what of the planes that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moestro.errors import RequestError
from moestro.store.layout import Layout


def resolve_level(asked: int, *, exact: int, promised: Sequence[int], name: str) -> int:
    """The level as asked, or the exact one for 0.

    Raises:
        RequestError: the store does not promise that level.
    """
    if asked == 0:
        return exact
    if asked not in promised:
        raise RequestError(
            f"Level {asked} was asked for, and {name} has {_listed(promised)} (0: {exact}, its exact one). Ask for one "
            "of these, or pack the model again with other levels."
        )
    return asked


def cut(layout: Layout, level: int) -> Layout:
    """The layout without the planes above `level`."""
    planes = tuple(plane for plane in layout.planes if plane.level <= level)
    assert planes, (level, layout)
    assert planes[-1].level == level, (level, layout)
    return replace(layout, planes=planes)


def _listed(levels: Sequence[int]) -> str:
    numbers = [str(level) for level in sorted(levels)]
    return f"level {numbers[0]} only" if len(numbers) == 1 else f"levels {', '.join(numbers)}"
