"""`--config FILE`: settings in a file, for commands that run for long. Flags and variables win over it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli.boundary import fail


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the defaults of the command's flags."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}). Expected a TOML file with settings.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f'{path} is not TOML ({error}). Expected lines such as: memory = "2GB".')
    known = {parameter.name for parameter in ctx.command.params if parameter.name not in ("config", "debug", "model")}
    given = {name.replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(given.keys() - known)
    if unknown:
        fail(
            f"{path} has {', '.join(unknown)}, which {ctx.info_name} does not have. It has {', '.join(sorted(known))}."
        )
    ctx.default_map = {name: _plain(path, name, value) for name, value in given.items()}
    return path


def _plain(path: Path, name: str, value: Any) -> Any:
    if not isinstance(value, str | int | float | bool):
        fail(f"{path} has {value!r} for {name}. Expected a text, a number, true or false.")
    return value


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="MOESTRO_CONFIG",
        is_eager=True,
        callback=_read,
        show_default=False,
        help='A TOML file with settings by the names of flags: memory = "2GB". Flags and variables win over it.',
    ),
]
