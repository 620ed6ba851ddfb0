"""One noun: a model is a store folder, a checkpoint folder, a built-in name or a Hugging Face id."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from moestro.config import PackOptions
from moestro.errors import StoreError
from moestro.store.checkpoint import Checkpoint
from moestro.store.checksum import checksum, to_hex
from moestro.store.fingerprint import fingerprint
from moestro.store.folders import cache_folder
from moestro.store.hub import download, is_hub_id
from moestro.store.manifest import MANIFEST_NAME, VERSION, has_manifest
from moestro.store.pack import PackProgress
from moestro.store.reader import PARTIAL_SUFFIX, Store

AUTOMATIC = PackOptions()
"""How a checkpoint is packed that has no store yet."""

Progress = Callable[[PackProgress], None]

BUILT_IN = ("tiny-qwen3moe-28m",)
"""Models that come with moestro."""


class Packer(Protocol):
    """`moestro.calibration.pack`, which this room does not know."""

    def __call__(
        self, source: Path, destination: Path, *, options: PackOptions, progress: Progress | None = None
    ) -> Store:
        """Make a store of the checkpoint folder `source`."""


def locate(
    model: str, *, auto_pack: bool, pack: Packer, options: PackOptions = AUTOMATIC, progress: Progress | None = None
) -> Path:
    """The folder of a store of `model`; a checkpoint is packed once into the cache folder when `auto_pack` allows it.

    `options` say how a checkpoint is packed; a store is taken as it is.

    Raises:
        StoreError: there is no such model, its store is not finished, there is no store and `auto_pack` is off, or the
            disk is too small.
        CheckpointError, UnsupportedModelError: the checkpoint cannot be packed.
    """
    folder = _local_folder(model)
    if folder is not None and has_manifest(folder):
        return Store.open(folder).path
    source = folder if folder is not None else _remote_folder(model, weights=True)
    with Checkpoint(source) as checkpoint:
        name = f"{_store_name(model)}-{fingerprint(checkpoint)}-{_recipe_key(options)}"
    destination = cache_folder() / "stores" / name
    if has_manifest(destination):
        return Store.open(destination).path
    if not auto_pack:
        raise StoreError(
            f"{model} is a checkpoint and there is no store of it yet, and packing it automatically is switched off. "
            f"Pack it with `moestro pack {model} STORE`, then give STORE."
        )
    return pack(source, destination, options=options, progress=progress).path


def locate_source(model: str, *, weights: bool = True) -> Path:
    """The checkpoint folder of `model`, for packing and planning. A store is not a source.

    Without `weights`, only the config and the index of a hub model are downloaded.

    Raises:
        StoreError: there is no such model, or it is a store.
    """
    folder = _local_folder(model)
    if folder is None:
        return _remote_folder(model, weights=weights)
    if has_manifest(folder):
        raise StoreError(f"{model} is a store already. Expected a checkpoint folder or a Hugging Face id.")
    return folder


def locate_shapes(model: str) -> Path:
    """The folder of a store, or of a checkpoint of which at least the config is there: enough for planning.

    Raises:
        StoreError: there is no such model.
    """
    return _local_folder(model) or _remote_folder(model, weights=False)


def _local_folder(model: str) -> Path | None:
    """The folder that `model` names, if there is one: a finished store or a checkpoint."""
    folder = Path(model).expanduser()
    name = folder.name
    if folder.is_file():
        raise StoreError(
            f"{model} is a file. Expected a folder (a store, or a checkpoint in safetensors format), one of the "
            f"built-in models ({', '.join(BUILT_IN)}) or a Hugging Face id such as owner/name."
        )
    unfinished = folder if name.endswith(PARTIAL_SUFFIX) else folder.parent / f"{name}{PARTIAL_SUFFIX}"
    is_ready = has_manifest(folder) or (folder / "config.json").is_file()
    if unfinished.is_dir() and (folder == unfinished or not is_ready):
        raise StoreError(
            f"{unfinished} is an unfinished store. Run the `moestro pack` command that began it again: it continues "
            "where it stopped."
        )
    if not folder.is_dir():
        return None
    if not is_ready:
        raise StoreError(
            f"{model} is neither a store (it has no {MANIFEST_NAME}) nor a checkpoint (it has no config.json). "
            "Give a folder that `moestro pack` wrote or a Hugging Face model folder."
        )
    return folder


def _remote_folder(model: str, *, weights: bool) -> Path:
    if model in BUILT_IN:
        return Path(str(files("moestro") / "models" / model))
    if is_hub_id(model):
        return download(model, weights=weights)
    raise StoreError(
        f"There is no model {model!r}. Expected a folder, one of the built-in models ({', '.join(BUILT_IN)}) or a "
        "Hugging Face id such as owner/name."
    )


def _recipe_key(options: PackOptions) -> str:
    """What tells stores apart that were packed otherwise, or by a moestro with another format."""
    return to_hex(checksum(f"{VERSION} {options}".encode()))[:8]


def _store_name(model: str) -> str:
    if is_hub_id(model) and not Path(model).expanduser().is_dir():
        return model.replace("/", "--")
    return Path(model).expanduser().resolve().name or "model"
