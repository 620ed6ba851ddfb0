"""Tiny random checkpoints with a tokenizer, and a text for them."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import save_checkpoint
from moestro.calibration import pack
from moestro.config import PackOptions

LETTERS = [chr(code) for code in range(33, 127)] + [" "]


def save_with_tokenizer(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A random checkpoint of `family` whose tokens are single characters."""
    model = save_checkpoint(family, folder, seed)
    tokenizer = Tokenizer(
        models.WordLevel({"?": 0} | {letter: 3 + i for i, letter in enumerate(LETTERS)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return model


def write_text(path: Path, documents: int = 6, length: int = 60, seed: int = 0) -> Path:
    """Random characters in `documents` documents."""
    rng = random.Random(seed)
    texts = ["".join(rng.choice(LETTERS) for _ in range(length)) for _ in range(documents)]
    path.write_text("\n\f\n".join(texts))
    return path


def packed_with_errors(family: str, folder: Path) -> Path:
    """A store of a small random model, beside its checkpoint, that knows its errors and its layers' sensitivities."""
    save_with_tokenizer(family, folder / "checkpoint")
    options = PackOptions(calibrate=str(write_text(folder / "text.txt")))
    return pack(folder / "checkpoint", folder / "store", options=options).path
