"""A random checkpoint of a few kilobytes that reads text: the built-in model's tokenizer, hardly any weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from families import FAMILIES, random_model
from moestro.store.locate import locate_source


def tiny_checkpoint(folder: Path, seed: int = 0, family: str = "qwen3_moe") -> Path:
    """Write it to `folder`, which must not exist."""
    config = FAMILIES[family]()
    config.vocab_size = 4096
    random_model(config, seed).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(locate_source("tiny-qwen3moe-28m") / name, folder / name)
    return folder
