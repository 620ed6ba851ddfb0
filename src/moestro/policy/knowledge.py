"""What a class found by name takes besides the shape of the model, checked before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

from moestro.errors import RequestError


def takes(factory: Callable[..., object]) -> set[str]:
    """Names of its keyword arguments."""
    return set(inspect.signature(factory).parameters) - {"shape"}


def needs(factory: Callable[..., object]) -> set[str]:
    """Those without a default."""
    parameters = inspect.signature(factory).parameters
    return {name for name in takes(factory) if parameters[name].default is inspect.Parameter.empty}


def check(what: str, factories: Iterable[Callable[..., object]], knowledge: Mapping[str, object]) -> None:
    """Raises RequestError when none of the factories takes some of `knowledge`, or one of them lacks what it needs."""
    every = list(factories)
    taken: set[str] = set().union(*(takes(factory) for factory in every))
    if unknown := sorted(set(knowledge) - taken):
        known = ", ".join(sorted(taken)) if taken else "nothing"
        raise RequestError(f"The {what} does not take {', '.join(unknown)}; it takes {known}.")
    needed: set[str] = set().union(*(needs(factory) for factory in every))
    if missing := sorted(needed - set(knowledge)):
        raise RequestError(f"The {what} needs {', '.join(missing)}, which was not given.")
