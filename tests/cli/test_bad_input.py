"""What is broken is named in one paragraph, with exit code 2, and nothing half-written stays behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cli.damage import flip_bit, truncate
from cli.running import MODEL, assert_user_error, run
from moestro import LLM, SamplingParams
from moestro.memory.direct import preadv
from moestro.memory.transfer import TransferEngine
from moestro.runtime import open as runtime_open

PROMPT = "def main(argv):\n    "
ARGUMENTS = ["--prompt", PROMPT, "--memory", "40MiB", "--context", "256", "--max-tokens", "8"]
PLANE = 192 << 10


@pytest.fixture(scope="module")
def used_expert(store: Path) -> int:
    """An expert of the first layer that the prompt needs."""
    with LLM(store, memory="100MiB", context=256) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=1))
        return int(llm.expert_counts()[0].argmax())


def _each(store: Path, *words: str) -> None:
    """Every command that opens a store refuses it with these words."""
    assert_user_error(run("generate", store, *ARGUMENTS), *words)
    assert_user_error(run("inspect", store), *words)
    assert_user_error(run("plan", store), *words)


def test_a_flipped_bit_in_a_plane(damaged: Path, used_expert: int) -> None:
    flip_bit(damaged / "experts.planes", used_expert * PLANE + 1000)
    result = run("generate", damaged, *ARGUMENTS)
    assert_user_error(result, "experts.planes", f"expert {used_expert}", "checksum")
    verified = run("inspect", damaged, "--verify")
    assert verified.exit_code == 2
    assert verified.stderr.count("error: ") == verified.stderr.count("\n") == 1
    assert f"expert {used_expert}" in verified.stderr
    problems = json.loads(run("inspect", damaged, "--verify", "--json").stdout)["problems"]
    assert len(problems) == 1


@pytest.mark.parametrize("place", [0.5, 1])
def test_a_flipped_bit_in_the_dense_weights(damaged: Path, place: float) -> None:
    file = damaged / "dense.safetensors"
    flip_bit(file, int(place * (file.stat().st_size - 1)))
    assert_user_error(run("generate", damaged, *ARGUMENTS), "dense.safetensors")


@pytest.mark.parametrize("name", ["dense.safetensors", "tokenizer.json", "config.json"])
def test_verify_reads_every_file(damaged: Path, name: str) -> None:
    flip_bit(damaged / name, 0)
    verified = run("inspect", damaged, "--verify")
    assert verified.exit_code == 2
    assert name in verified.stderr


@pytest.mark.parametrize("place", [0, 0.3, 0.9])
def test_a_flipped_bit_in_the_manifest(damaged: Path, place: float) -> None:
    file = damaged / "manifest.json"
    flip_bit(file, int(place * file.stat().st_size))
    _each(damaged, "manifest.json")


@pytest.mark.parametrize("name", ["experts.planes", "dense.safetensors", "tokenizer.json"])
def test_a_truncated_file(damaged: Path, name: str) -> None:
    truncate(damaged / name, 4096)
    _each(damaged, name, "truncated")


@pytest.mark.parametrize("name", ["experts.planes", "dense.safetensors", "tokenizer.json"])
def test_a_missing_file(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    _each(damaged, name, "missing")


def test_a_missing_manifest(damaged: Path) -> None:
    (damaged / "manifest.json").unlink()
    assert run("generate", damaged, *ARGUMENTS).exit_code == 2


def test_another_version_of_the_format(damaged: Path) -> None:
    file = damaged / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["version"] = 99
    file.write_text(json.dumps(manifest))
    _each(damaged, "version 99")


def test_an_unreadable_block(store: Path, used_expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses one block of the plane file, as it does when a disk has a bad one."""
    bad = used_expert * PLANE

    def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]) and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".planes"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(runtime_open, "TransferEngine", partial(TransferEngine, read_at=read_at))
    assert_user_error(
        run("generate", store, *ARGUMENTS), "experts.planes", f"expert {used_expert}", os.strerror(errno.EIO)
    )


@pytest.mark.parametrize("memory", ["banana", "", "-1", "0", "101%", "12 parsecs"])
def test_a_memory_that_is_none(store: Path, memory: str) -> None:
    for name in ("generate", "plan"):
        arguments = ["--prompt", "a"] if name == "generate" else []
        assert_user_error(run(name, store, *arguments, "--memory", memory), "Memory: ", "such as 25%")


def test_too_little_memory_names_the_least(store: Path) -> None:
    asked = run("plan", store, "--memory", "1MiB", "--json", "--context", "256")
    least = json.loads(asked.stdout)["least_bytes"]
    too_little = ["--context", "256", "--memory", str(least - 1)]
    assert_user_error(run("generate", store, "--prompt", PROMPT, *too_little), str(least))
    assert_user_error(run("plan", store, *too_little), str(least))
    enough = ["--context", "256", "--memory", str(least), "--max-tokens", "2"]
    assert run("generate", store, "--prompt", PROMPT, *enough).exit_code == 0


def test_a_prompt_longer_than_the_context(store: Path) -> None:
    result = run("generate", store, *ARGUMENTS[2:], "--prompt", "word " * 400)
    assert_user_error(result, "context", "256")


def test_a_context_longer_than_the_models(store: Path) -> None:
    assert_user_error(run("generate", store, "--prompt", "a", "--context", "100000"), "1024")


def _llama(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _with_config(**changes: object) -> Callable[[Path], None]:
    """A model folder with the built-in model's config, changed."""

    def write(folder: Path) -> None:
        folder.mkdir()
        config = {"model_type": "qwen3_moe", "num_experts": 4, **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return write


def _foreign(folder: Path) -> None:
    _with_config()(folder)
    (folder / "model.gguf").touch()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (_llama, "not a mixture-of-experts model"),
        (_with_config(model_type="no_such_architecture"), "'no_such_architecture' is unknown"),
        (_with_config(model_type="switch_transformers"), "encoder-decoder"),
        (_with_config(quantization_config={"quant_method": "awq"}), "'awq'"),
        (_with_config(quantization_config={"quant_method": "gptq"}), "'gptq'"),
    ],
    ids=["dense", "unknown", "encoder-decoder", "awq", "gptq"],
)
def test_models_that_are_refused(tmp_path: Path, write: Callable[[Path], None], words: str) -> None:
    source, cache, destination = tmp_path / "model", tmp_path / "cache", tmp_path / "store"
    cache.mkdir()
    write(source)
    before = sorted(tmp_path.rglob("*"))
    environment = {"MOESTRO_CACHE": str(cache)}
    assert_user_error(run("pack", source, destination), words)
    assert_user_error(run("inspect", source), words)
    assert_user_error(run("plan", source), words)
    assert sorted(tmp_path.rglob("*")) == before
    assert run("generate", source, "--prompt", "a", env=environment).exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_files_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    _foreign(tmp_path / "model")
    assert_user_error(run("pack", tmp_path / "model", tmp_path / "store"), "GGUF")


@pytest.mark.parametrize("model", ["no-such-model", "no/such/folder/at/all", "owner/name"])
def test_models_that_are_not_there(model: str) -> None:
    for arguments in (["inspect", model], ["plan", model], ["generate", model, "--prompt", "a"]):
        assert_user_error(run(*arguments), model)


def test_pack_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter.txt").write_text("mine")
    assert_user_error(run("pack", MODEL, tmp_path / "store"), "not a store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["letter.txt"]
    assert_user_error(run("pack", MODEL, tmp_path / "other", "--dtype", "int3"), "int3", "bfloat16")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--levels", "5"], ["levels is '5'", "2, 3, 4, 8"]),
        (["--exact-level", "6"], ["exact_level is 6", "2,3,4,8"]),
        (["--dense-bits", "5"], ["dense_bits is 5"]),
        (["--encoding", "odd"], ["encoding is 'odd'", "nested, signs"]),
        (["--levels", "raw", "--encoding", "signs"], ["encoding is 'signs'", "no effect"]),
        (["--levels", "raw", "--no-calibration"], ["calibration is False", "no effect"]),
        (["--calibrate", "text.txt", "--no-calibration"], ["calibrate is 'text.txt'", "no effect"]),
        (["--calibrate", "/no/such/text.txt"], ["/no/such/text.txt", "--no-calibration"]),
        (["--calibrate", "EMPTY"], ["empty.txt is empty"]),
        (["--calibrate", "SHORT"], ["short.txt has no document of at least 8 tokens"]),
        (["--calibrate", "BINARY"], ["binary.txt is not UTF-8"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_pack_options_that_are_of_no_use(flags: list[str], words: list[str], tmp_path: Path) -> None:
    for name, content in (("empty", b" \n\f\n"), ("short", b"one\n\f\ntwo"), ("binary", b"\xff\xfe\x00")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    given = [str(tmp_path / f"{flag.lower()}.txt") if flag in ("EMPTY", "SHORT", "BINARY") else flag for flag in flags]
    assert_user_error(run("pack", MODEL, tmp_path / "store", *given), *words)
    assert not list(tmp_path.glob("store*"))
