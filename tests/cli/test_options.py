"""Every field of the options dataclasses is a flag, an environment variable and a line of help."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cli.running import run
from moestro.cli.options import Flag, Only, flags_of, spread_options
from moestro.config import RuntimeOptions, SamplingParams

FLAGS = [*flags_of(RuntimeOptions), *flags_of(SamplingParams)]


@pytest.fixture(scope="module")
def generate_help() -> str:
    wide = run("generate", "--help", env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).stdout
    return re.sub(r"\s+", " ", wide)


def test_every_field_has_a_flag() -> None:
    fields = [*dataclasses.fields(RuntimeOptions), *dataclasses.fields(SamplingParams)]
    assert [flag.name for flag in FLAGS] == [field.name for field in fields]
    assert all(flag.type in (bool, int, float, str) for flag in FLAGS)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_in_the_help(flag: Flag, generate_help: str) -> None:
    for name in flag.declaration.split("/"):
        assert f"{name} " in generate_help
    assert f"[env var: {flag.variable}]" in generate_help
    assert flag.help in generate_help


def _probe() -> tuple[typer.Typer, list[object]]:
    """A command that takes all options and notes what it was given."""
    seen: list[object] = []
    probe = typer.Typer()

    def command(options: RuntimeOptions, sampling: SamplingParams) -> None:
        seen.extend([options, sampling])

    command.__annotations__ = {"options": RuntimeOptions, "sampling": SamplingParams, "return": None}
    probe.command()(spread_options(command))
    return probe, seen


OTHER = {
    "memory": "7MiB",
    "context": 17,
    "max_sequences": 3,
    "threads": 5,
    "policy": "other",
    "auto_pack": False,
    "max_tokens": 11,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 9,
    "seed": 13,
    "ignore_eos": True,
}


def test_the_table_of_other_values_is_complete() -> None:
    assert {flag.name: flag.default for flag in FLAGS}.keys() == OTHER.keys()
    assert all(flag.default != OTHER[flag.name] for flag in FLAGS)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
@pytest.mark.parametrize("way", ["flag", "environment", "flag over environment"])
def test_a_value_arrives(flag: Flag, way: str) -> None:
    probe, seen = _probe()
    value = OTHER[flag.name]
    names = flag.declaration.split("/")
    arguments = [names[0 if value else 1]] if flag.type is bool else [names[0], str(value)]
    environment = {flag.variable: str(flag.default if way.startswith("flag") else value)}
    result = CliRunner().invoke(probe, [] if way == "environment" else arguments, env=environment)
    assert result.exit_code == 0, result.output
    options, sampling = seen
    home = options if hasattr(options, flag.name) else sampling
    assert getattr(home, flag.name) == value
    assert dataclasses.replace(home, **{flag.name: flag.default}) == type(home)()  # type: ignore[type-var]


def test_defaults_are_those_of_the_dataclasses() -> None:
    probe, seen = _probe()
    assert CliRunner().invoke(probe, []).exit_code == 0
    assert seen == [RuntimeOptions(), SamplingParams()]


def test_only_some_fields_can_be_taken() -> None:
    seen: list[RuntimeOptions] = []
    probe = typer.Typer()

    def command(options: RuntimeOptions) -> None:
        seen.append(options)

    command.__annotations__ = {"options": Annotated[RuntimeOptions, Only("memory", "threads")]}
    probe.command()(spread_options(command))
    assert CliRunner().invoke(probe, ["--memory", "1GB", "--threads", "2"]).exit_code == 0
    assert seen == [RuntimeOptions(memory="1GB", threads=2)]
    assert CliRunner().invoke(probe, ["--policy", "lru"]).exit_code == 2
