"""Tokenizers and end tokens as they come with stores, whole and damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, save_checkpoint
from moestro.engine.tokenizer import end_token_ids, load_tokenizer
from moestro.errors import StoreError
from moestro.store.reader import Store
from packing import pack_raw


@dataclass
class _Folder:
    """Stands where only a store's folder is looked at."""

    path: Path


def _end_ids(folder: Path, generation: str | None) -> frozenset[int]:
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    store: Any = _Folder(folder)
    return end_token_ids(store, FAMILIES["mixtral"]())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, {2}),
        ({}, {2}),
        ({"eos_token_id": None}, {2}),
        ({"eos_token_id": 7}, {7}),
        ({"eos_token_id": [3, 9]}, {3, 9}),
    ],
)
def test_end_tokens(tmp_path: Path, settings: dict[str, Any] | None, expected: set[int]) -> None:
    assert _end_ids(tmp_path, None if settings is None else json.dumps(settings)) == expected


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}'])
def test_damaged_end_tokens_are_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(StoreError, match=r"generation_config|eos_token_id"):
        _end_ids(tmp_path, content)


def test_a_model_packed_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint("mixtral", tmp_path / "checkpoint")
    store = pack_raw(tmp_path / "checkpoint", tmp_path / "store")
    assert isinstance(store, Store)
    with pytest.raises(StoreError, match="tokenizer"):
        load_tokenizer(store)
