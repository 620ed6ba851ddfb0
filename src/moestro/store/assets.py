"""The small files that travel with a model: config, tokenizer, chat template, generation defaults."""

from __future__ import annotations

import shutil
from pathlib import Path

from moestro.store.checksum import checksum_file
from moestro.store.manifest import FileEntry

ASSET_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Copied into a store when the checkpoint has them. No code: `trust_remote_code` models are not run."""

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
"""Without one of these there is no tokenizer: transformers would make an empty one."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def asset_paths(folder: Path) -> list[Path]:
    """The asset files of a checkpoint, in a fixed order."""
    return [folder / name for name in ASSET_NAMES if (folder / name).is_file()]


def copy_assets(source: Path, destination: Path) -> tuple[FileEntry, ...]:
    """Copy the assets and describe the copies. Raises OSError."""
    entries = []
    for path in asset_paths(source):
        copy = destination / path.name
        shutil.copyfile(path, copy)
        entries.append(FileEntry(copy.name, copy.stat().st_size, checksum_file(copy)))
    return tuple(entries)
