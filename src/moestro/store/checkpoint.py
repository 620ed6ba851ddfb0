"""A Hugging Face checkpoint folder: its config, its keys, and its tensors, read piece by piece."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moestro.errors import CheckpointError
from moestro.store.quantised import SourceTensor, sources_of
from moestro.store.safetensors_file import SafetensorsFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FOREIGN = {
    "*.gguf": "GGUF files (llama.cpp)",
    "pytorch_model*.bin": "pytorch_model.bin files (Python pickles, which can run code)",
    "*.pth": ".pth files (Python pickles, which can run code)",
    "*.ckpt": ".ckpt files (Python pickles, which can run code)",
    "consolidated*.safetensors": "consolidated.safetensors files (another key layout)",
    "*.h5": "TensorFlow files",
    "*.msgpack": "Flax files",
}


class Checkpoint:
    """An open checkpoint: `tensors` maps each key to a description; `read` and `read_rows` give values.

    Quantised tensors (MXFP4, block fp8) appear under the name of what they hold and are dequantised when read.
    Close it, or use it as a context manager.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is one that packing does not read.
    """

    origin = ""
    """What the fingerprint begins with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: tuple[SafetensorsFile, ...] = ()
        self.config = read_config(folder)
        self._stack = ExitStack()
        try:
            self.files = tuple(self._open(folder / name) for name in shard_names(folder))
            quantisation = self.config.get("quantization_config")
            self.tensors: dict[str, SourceTensor] = sources_of(
                self.files, quantisation if isinstance(quantisation, dict) else None
            )
        except BaseException:
            self.close()
            raise

    @property
    def quantisation(self) -> str | None:
        """The method with which the checkpoint is quantised: "mxfp4", "fp8" or None."""
        settings = self.config.get("quantization_config")
        return str(settings.get("quant_method")) if isinstance(settings, dict) else None

    def read(self, key: str) -> torch.Tensor:
        """All values of a tensor (fp32 where it was quantised)."""
        return self.tensors[key].read()

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Values of rows `start` to `stop` along the first dimension."""
        return self.tensors[key].read_rows(start, stop)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        self._stack.callback(file.close)
        return file


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json as it is. Raises CheckpointError."""
    return _read_json(folder / "config.json")


def shard_names(folder: Path) -> list[str]:
    """The names of the checkpoint's safetensors files, in order.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    if (folder / INDEX_NAME).is_file():
        names = _index_shards(folder / INDEX_NAME)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, {missing[0]} among them. "
                "Download or copy the checkpoint again."
            )
        return names
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    for pattern, kind in _FOREIGN.items():
        if next(folder.glob(pattern), None) is not None:
            raise CheckpointError(
                f"{folder} holds {kind}, which moestro does not read. Expected {SINGLE_NAME} or {INDEX_NAME}: "
                "take the model in safetensors format, or convert it with transformers' save_pretrained."
            )
    raise CheckpointError(
        f"{folder} holds no weights. Expected {SINGLE_NAME} or {INDEX_NAME} with its files beside config.json."
    )


def _index_shards(path: Path) -> list[str]:
    weight_map = _read_json(path).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(
            f"{path} has no usable weight_map. Expected an object from tensor names to file names. Download it again."
        )
    return sorted(names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Expected a Hugging Face model folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download or copy it again.")
    return value
