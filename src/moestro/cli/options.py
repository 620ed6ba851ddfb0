"""Flags, environment twins and help texts, derived from the dataclasses of `moestro.config`.

A command asks for a whole dataclass (`options: RuntimeOptions`); `spread_options` shows its fields to Typer as flags
and hands the command an instance. So a field that is added to a dataclass is a flag, a `MOESTRO_*` variable, a line of
`--help` and a row of `docs/options.md` without another word.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

Command = Callable[..., None]

_PANELS = {
    "RuntimeOptions": "How the model is opened",
    "SamplingParams": "How tokens are picked",
    "PackOptions": "How the store is made",
    "VariantOptions": "How the variant is made",
    "SimulateOptions": "What is simulated",
    "BenchOptions": "What is measured",
    "ServeOptions": "How it listens",
    "ChatOptions": "How it asks",
    "LoadOptions": "What is asked",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of an options dataclass as the command line shows it."""

    name: str
    type: type
    default: Any
    help: str
    panel: str

    @property
    def declaration(self) -> str:
        """`--max-tokens`, or `--auto-pack/--no-auto-pack` for a switch."""
        dashed = self.name.replace("_", "-")
        return f"--{dashed}/--no-{dashed}" if self.type is bool else f"--{dashed}"

    @property
    def variable(self) -> str:
        """The environment variable that sets the same value."""
        return f"MOESTRO_{self.name.upper()}"

    def parameter(self) -> inspect.Parameter:
        """The flag as a keyword parameter that Typer understands."""
        option = typer.Option(self.declaration, envvar=self.variable, help=self.help, rich_help_panel=self.panel)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[self.type, option],
        )


@dataclasses.dataclass(frozen=True)
class Only:
    """`Annotated[RuntimeOptions, Only("memory")]`: the command has no use for the other fields, so no flags."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A parameter of a command that stands for many flags."""

    options_class: type
    flags: tuple[Flag, ...]

    def take(self, values: dict[str, Any]) -> Any:
        """Build the dataclass from the flags' values, which are removed from `values`."""
        return self.options_class(**{flag.name: values.pop(flag.name) for flag in self.flags})


def flags_of(options_class: type, only: tuple[str, ...] | None = None) -> tuple[Flag, ...]:
    """The flags of an options dataclass, in the order of its fields (all of them, or those named by `only`)."""
    types = get_type_hints(options_class)
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    return tuple(
        Flag(
            name=name,
            type=types[name],
            default=fields[name].default,
            help=fields[name].metadata["help"],
            panel=_PANELS[options_class.__name__],
        )
        for name in (fields if only is None else only)
        if fields[name].metadata.get("flag", True)
    )


def spread_options(function: Command) -> Command:
    """Turn every parameter of `function` whose type is an options dataclass into one flag per field."""
    groups: dict[str, _Group] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        group = _group(hints[name])
        if group is None:
            parameters.append(parameter.replace(annotation=hints[name]))
        else:
            groups[name] = group
            parameters.extend(flag.parameter() for flag in group.flags)

    def spread(**values: Any) -> None:
        built = {name: group.take(values) for name, group in groups.items()}
        function(**values, **built)

    return with_parameters(spread, function, parameters)


def with_parameters(wrapper: Command, wrapped: Command, parameters: list[inspect.Parameter]) -> Command:
    """Give `wrapper` the name and help of `wrapped` and these parameters, for Typer to read (it calls by keyword)."""
    functools.update_wrapper(wrapper, wrapped)
    del wrapper.__dict__["__wrapped__"]
    by_keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    wrapper.__dict__["__signature__"] = inspect.Signature(by_keyword)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _group(hint: Any) -> _Group | None:
    annotated = get_origin(hint) is Annotated
    options_class, *extras = get_args(hint) if annotated else (hint,)
    if not dataclasses.is_dataclass(options_class) or not isinstance(options_class, type):
        return None
    only = next((extra.names for extra in extras if isinstance(extra, Only)), None)
    return _Group(options_class, flags_of(options_class, only))
