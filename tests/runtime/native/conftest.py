from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from families import random_model
from moestro.config import PackOptions
from moestro.store.pack import pack
from packing import pack_raw
from runtime.native.variants import MakeStore


@pytest.fixture(scope="module")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """A store of a random model of a config, in a type of weights or (with `dense_bits` 8 or 4) quantised."""

    def make(config: Callable[[], PreTrainedConfig], dtype: torch.dtype, dense_bits: int = 16) -> Path:
        folder = tmp_path_factory.mktemp("model")
        random_model(config(), dtype=dtype).save_pretrained(folder / "checkpoint")
        if dense_bits == 16:
            pack_raw(folder / "checkpoint", folder / "store")
        else:
            options = PackOptions(levels="4", dense_bits=dense_bits, calibration=False)
            pack(folder / "checkpoint", folder / "store", options=options)
        return folder / "store"

    return make
