"""What an option is: a field of a frozen dataclass with a default and a help text."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from moestro.errors import MoestroError


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field whose `help` text is shown by the command line and the docs.

    In `extra`: `flag=False`, a field of requests that the command line does not offer; `plain=False`, its value is no
    plain one, and its class checks it by itself.
    """
    return field(default=default, metadata={"help": help, **extra})


def check_least(options: Any, error: type[MoestroError], **least: int) -> None:
    """Raise `error` for a field of a whole number that is less than it may be."""
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise error(f"{name} is {getattr(options, name)}, expected a whole number of at least {bound}.")


def check_types(options: Any, error: type[MoestroError]) -> None:
    """Raise `error` for a field whose value is not of the type it is declared with (a whole number may be a float)."""
    for one in fields(options):
        if not one.metadata.get("plain", True):
            continue
        value, wanted = getattr(options, one.name), type(one.default)
        accepted = (int, float) if wanted is float else wanted
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            raise error(f"{one.name} is {value!r}, expected a value of type {wanted.__name__}.")
