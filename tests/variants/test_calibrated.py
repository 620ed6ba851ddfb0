"""Codes that are found by running a fine-tune, and learned from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional

from families import FAMILIES
from fine_tunes import base_checkpoint, fine_tune
from moestro.config import PackOptions, VariantOptions
from moestro.errors import VariantError
from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.store.pack import pack
from moestro.store.reader import Store
from moestro.variants.add import add_variant
from packing import pack_raw
from variants.serving import logits, served

WORDS = [f"w{number}" for number in range(150)]


def _give_tokenizer(folder: Path) -> None:
    """One word, one token."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}'
    )


def _ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 120, (rows, 48), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\f".join(" ".join(WORDS[token - 1] for token in row) for row in _ids(24, 1).tolist()))
    return path


@pytest.fixture(scope="module")
def models_(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = base_checkpoint(folder / "base")
    _give_tokenizer(base)
    return base, fine_tune(base, folder / "tuned", size=0.15)


@pytest.fixture
def store(models_: tuple[Path, Path], tmp_path: Path) -> Store:
    return pack_raw(models_[0], tmp_path / "store")


def _divergence(store: Store, models_: tuple[Path, Path], options: VariantOptions, name: str) -> float:
    """From the fine-tune, of tokens that no code has seen."""
    base, tuned = models_
    variant = add_variant(store, name, str(tuned), options=options)
    wanted, found = logits(tuned, None, _ids(8, 2)), logits(base, served(base, variant, store), _ids(8, 2))
    pair = (one.log_softmax(-1).flatten(0, 1) for one in (found, wanted))
    return float(functional.kl_div(*pair, log_target=True, reduction="batchmean"))


def test_a_text_and_steps_bring_it_nearer(store: Store, models_: tuple[Path, Path], text: Path) -> None:
    plain = _divergence(store, models_, VariantOptions(calibration=False), "plain")
    calibrated = _divergence(store, models_, VariantOptions(calibrate=str(text)), "calibrated")
    learned = _divergence(store, models_, VariantOptions(calibrate=str(text), distill_steps=15), "learned")
    assert calibrated < plain
    assert learned < 0.98 * calibrated


def test_bitdelta_learns_one_size_for_each_matrix(store: Store, models_: tuple[Path, Path], text: Path) -> None:
    signs = VariantOptions(method="bitdelta", bits=1, salient=0.0, calibration=False)
    plain = _divergence(store, models_, signs, "plain")
    learning = VariantOptions(method="bitdelta", bits=1, salient=0.0, calibrate=str(text), distill_steps=15)
    assert _divergence(store, models_, learning, "learned") < plain


def test_what_the_variant_says_of_its_text(store: Store, models_: tuple[Path, Path], text: Path) -> None:
    options = VariantOptions(calibrate=str(text), distill_steps=2)
    manifest = add_variant(store, "one", str(models_[1]), options=options).manifest
    assert manifest.text is not None
    assert (manifest.text.name, manifest.tokens, manifest.distilled) == ("text.txt", 24 * 48, 2)
    assert "calibrated on 1152 tokens only" in manifest.warnings[0]


def test_the_same_twice_is_the_same_bytes(store: Store, models_: tuple[Path, Path], text: Path) -> None:
    first, second = (
        add_variant(store, name, str(models_[1]), options=VariantOptions(calibrate=str(text))) for name in ("a", "b")
    )
    assert first.planes_file.read_bytes() == second.planes_file.read_bytes()
    assert first.dense_file.read_bytes() == second.dense_file.read_bytes()


@pytest.mark.parametrize("family", ["gpt_oss", "phimoe"])
def test_every_family_can_be_calibrated_and_learn(family: str, text: Path, tmp_path: Path) -> None:
    assert family in FAMILIES
    base = base_checkpoint(tmp_path / "base", family)
    _give_tokenizer(base)
    models_ = base, fine_tune(base, tmp_path / "tuned", size=0.15)
    store = pack(base, tmp_path / "store", options=PackOptions(calibration=False))
    plain = _divergence(store, models_, VariantOptions(calibration=False), "plain")
    learned = _divergence(store, models_, VariantOptions(calibrate=str(text), distill_steps=4), "learned")
    assert learned < 0.9 * plain
    assert build_skeleton(config_from_dict(store.config_dict)).dense.keys() == store.dense.keys()


def test_text_without_a_tokenizer(models_: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(models_[0], tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    store = pack_raw(bare, tmp_path / "store")
    tuned = fine_tune(bare, tmp_path / "tuned")
    with pytest.raises(VariantError, match="no tokenizer"):
        add_variant(store, "one", str(tuned), options=VariantOptions(calibrate=str(text)))
    variant = add_variant(store, "one", str(tuned))
    assert variant.manifest.text is None
    assert "not calibrated" in variant.manifest.warnings[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"calibration": False, "calibrate": "x"}, "calibrate is 'x'"),
        ({"calibration": False, "distill_steps": 3}, "distill_steps is 3"),
        ({"distill_steps": -1}, "distill_steps is -1"),
        ({"method": "bitdelta"}, "1 bit"),
        ({"calibrate": "/nowhere/text.txt"}, "cannot be read"),
    ],
)
def test_options_that_are_none(values: dict[str, object], words: str, store: Store, models_: tuple[Path, Path]) -> None:
    with pytest.raises(VariantError, match=words):
        add_variant(store, "one", str(models_[1]), options=VariantOptions(**values))  # type: ignore[arg-type]
