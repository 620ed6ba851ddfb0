from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from families import random_model
from moestro.store.pack import pack
from runtime.native.variants import MakeStore


@pytest.fixture(scope="module")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """A store of a random model of a config, in a type of weights."""

    def make(config: Callable[[], PreTrainedConfig], dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp("model")
        random_model(config(), dtype=dtype).save_pretrained(folder / "checkpoint")
        pack(folder / "checkpoint", folder / "store")
        return folder / "store"

    return make
