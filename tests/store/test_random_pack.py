"""`pack --random`: stores of any family from a config alone, whole, alike for the same seed, and with finite logits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from families import FAMILIES
from moestro.config import PackOptions
from moestro.errors import CheckpointError, PackError, StoreError
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.locate import locate_source
from moestro.store.pack import PackLimits, PackProgress
from moestro.store.pack_plan import expert_layouts
from moestro.store.random_pack import pack_random
from moestro.store.reader import Store
from opening import logits_of, open_store

PROMPT = [5, 17, 3, 9, 9, 12, 80, 41, 2, 77]


def _config(family: str, folder: Path) -> Path:
    FAMILIES[family]().save_pretrained(folder)
    return folder / "config.json"


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    config = _config(family, tmp_path / "config")
    store = pack_random(str(config), tmp_path / "store")
    assert store.verify() == []
    with open_store(store.path) as opened:
        logits = logits_of(opened, PROMPT)
        assert logits.isfinite().all()
        assert 0.3 < float(logits.std()) < 3
        assert np.count_nonzero(opened.runner.expert_counts) > 3


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize(
    "options",
    [
        PackOptions(levels="2,4", encoding="signs", dense_bits=4),
        PackOptions(levels="8", exact_level=8, dense_bits=16),
        PackOptions(levels="raw"),
    ],
)
def test_every_encoding(family: str, options: PackOptions, tmp_path: Path) -> None:
    config = _config(family, tmp_path / "config")
    store = pack_random(str(config), tmp_path / "store", options=options)
    assert store.verify() == []
    skeleton = build_skeleton(load_config(config.parent))
    assert tuple(layer.layout for layer in store.layers) == expert_layouts(skeleton, store.manifest.dtype, options)
    assert store.manifest.dense_bits == (16 if options.is_raw else options.dense_bits)
    with open_store(store.path) as opened:
        logits = logits_of(opened, PROMPT)
        assert logits.isfinite().all()
        assert 0.3 < float(logits.std()) < 3


def test_the_seed_and_nothing_else_decides(tmp_path: Path) -> None:
    config = str(_config("gpt_oss", tmp_path / "config"))
    seeds = {"first": 7, "again": 7, "other": 8}
    first, again, other = (pack_random(config, tmp_path / name, seed=seed).path for name, seed in seeds.items())
    assert _content(first) == _content(again)
    planes = [(one / "experts.planes").read_bytes() for one in (first, other)]
    assert planes[0] != planes[1]
    assert [Store.open(one).manifest.source.fingerprint[:9] for one in (first, other)] == ["random-7-", "random-8-"]
    assert pack_random(config, first, seed=7).path == first
    with pytest.raises(StoreError, match="another checkpoint or packed otherwise"):
        pack_random(config, first, seed=8)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 12, 30])
def test_an_interrupted_pack_goes_on(after: int, tmp_path: Path) -> None:
    config = str(_config("gpt_oss", tmp_path / "config"))
    whole = pack_random(config, tmp_path / "whole").path
    calls = 0

    def stop(_: PackProgress) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise _KilledError

    limits = PackLimits(sync_bytes=1)
    with pytest.raises(_KilledError):
        pack_random(config, tmp_path / "store", progress=stop, limits=limits)
    assert (tmp_path / "store.partial").is_dir()
    seen: list[int] = []
    store = pack_random(config, tmp_path / "store", progress=lambda step: seen.append(step.done_bytes), limits=limits)
    assert seen[0] > 0
    assert _content(store.path) == _content(whole)


def test_the_manifest_says_that_it_is_random(tmp_path: Path) -> None:
    config = str(_config("olmoe", tmp_path / "config"))
    facts = pack_random(config, tmp_path / "store", seed=3).manifest.calibration
    assert facts is not None
    assert facts.text is None
    assert facts.sensitivity is None
    assert any("random weights of seed 3" in warning for warning in facts.warnings)
    assert len(facts.errors) == 3
    assert all(errors == tuple(sorted(errors, reverse=True)) for layer in facts.errors for errors in layer)


def test_a_tokenizer_beside_the_config_comes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config("olmoe", tmp_path / "config")
    with caplog.at_level(logging.WARNING, "moestro"):
        pack_random(str(config), tmp_path / "borrowed")
    assert "There is no tokenizer beside" in caplog.text
    assert "has 160" in caplog.text
    own = json.loads((locate_source("tiny-qwen3moe-28m") / "tokenizer.json").read_text())
    own["model"]["vocab"] = {token: number for token, number in own["model"]["vocab"].items() if number < 160}
    (config.parent / "tokenizer.json").write_text(json.dumps(own))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moestro"):
        store = pack_random(str(config.parent), tmp_path / "own")
    assert caplog.text == ""
    assert (store.path / "tokenizer.json").read_bytes() == (config.parent / "tokenizer.json").read_bytes()


def test_a_config_of_another_name(tmp_path: Path) -> None:
    config = _config("qwen3_moe", tmp_path / "config")
    renamed = shutil.copyfile(config, tmp_path / "shape.json")
    store = pack_random(str(renamed), tmp_path / "store")
    assert store.config_dict == json.loads(config.read_text())


def test_published_quantisation_does_not_matter(tmp_path: Path) -> None:
    config = _config("gpt_oss", tmp_path / "config")
    body = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    config.write_text(json.dumps(body))
    store = pack_random(str(config), tmp_path / "store")
    assert store.manifest.source.quantisation is None
    assert store.manifest.encoding == "nested"


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    config = _config("olmoe", tmp_path / "config")
    with pytest.raises(PackError, match="nothing to calibrate"):
        pack_random(str(config), tmp_path / "store", options=PackOptions(calibrate="a.txt"))
    with pytest.raises(PackError, match="seed of random weights is -1"):
        pack_random(str(config), tmp_path / "store", seed=-1)
    with pytest.raises(StoreError, match="There is no model"):
        pack_random(str(tmp_path / "nothing.json"), tmp_path / "store")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        pack_random(str(tmp_path / "bad.json"), tmp_path / "store")
    assert not (tmp_path / "store").exists()
