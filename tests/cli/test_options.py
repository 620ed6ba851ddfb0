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
from moestro.config import PackOptions, RuntimeOptions, SamplingParams

FLAGS = [*flags_of(RuntimeOptions), *flags_of(SamplingParams), *flags_of(PackOptions)]


@pytest.fixture(scope="module")
def helps() -> str:
    wide = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
    return re.sub(r"\s+", " ", "".join(run(name, "--help", env=wide).stdout for name in ("generate", "pack")))


def test_every_field_has_a_flag() -> None:
    classes = (RuntimeOptions, SamplingParams, PackOptions)
    fields = [field for one in classes for field in dataclasses.fields(one) if field.metadata.get("flag", True)]
    assert [flag.name for flag in FLAGS] == [field.name for field in fields]
    assert all(flag.type in (bool, int, float, str) for flag in FLAGS)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_in_the_help(flag: Flag, helps: str) -> None:
    for name in flag.declaration.split("/"):
        assert f"{name} " in helps
    assert f"[env var: {flag.variable}]" in helps
    assert flag.help in helps


def _probe() -> tuple[typer.Typer, list[object]]:
    """A command that takes all options and notes what it was given."""
    seen: list[object] = []
    probe = typer.Typer()

    def command(options: RuntimeOptions, sampling: SamplingParams, packing: PackOptions) -> None:
        seen.extend([options, sampling, packing])

    command.__annotations__ = {
        "options": RuntimeOptions,
        "sampling": SamplingParams,
        "packing": PackOptions,
        "return": None,
    }
    probe.command()(spread_options(command))
    return probe, seen


OTHER = {
    "memory": "7MiB",
    "level": 2,
    "context": 17,
    "max_sequences": 3,
    "threads": 5,
    "policy": "other",
    "predictor": "other",
    "prefetch": "off",
    "learn": "off",
    "order": "johnson",
    "quality": "fast",
    "level_policy": "gate",
    "admit": "alike",
    "prefix_cache": False,
    "lend_kv": False,
    "variant": "spanish",
    "auto_pack": False,
    "max_tokens": 11,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 9,
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "seed": 13,
    "ignore_eos": True,
    "levels": "2,4",
    "exact_level": 8,
    "encoding": "signs",
    "dense_bits": 16,
    "calibration": False,
    "calibrate": "text.txt",
    "dtype": "float16",
    "bit_router": True,
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
    home = next(options for options in seen if hasattr(options, flag.name))
    assert getattr(home, flag.name) == value
    assert dataclasses.replace(home, **{flag.name: flag.default}) == type(home)()  # type: ignore[type-var]


def test_defaults_are_those_of_the_dataclasses() -> None:
    probe, seen = _probe()
    assert CliRunner().invoke(probe, []).exit_code == 0
    assert seen == [RuntimeOptions(), SamplingParams(), PackOptions()]


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
