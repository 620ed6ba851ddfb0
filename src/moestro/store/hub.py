"""Models from the Hugging Face hub: only weights in safetensors, configs and tokenizer files, never code."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# The hub's HTTP library changes between its versions (httpx, httpx2); this is the error class of the one in use.
from huggingface_hub.errors import HTTPError as _HTTPError  # type: ignore[attr-defined]

from moestro.errors import StoreError
from moestro.store.assets import ASSET_NAMES
from moestro.store.checkpoint import INDEX_NAME, SINGLE_NAME
from moestro.store.disk import check_free

_PLAN_FILES = [*ASSET_NAMES, INDEX_NAME]
_WEIGHT_FILES = [*_PLAN_FILES, SINGLE_NAME, "model-*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form OWNER/NAME."""
    return _HUB_ID.fullmatch(model) is not None


def download(model: str, *, weights: bool) -> Path:
    """The folder with the files of hub model `model`, from the hub's cache where they are there already.

    Without `weights`: configs, tokenizer and the index of the weights only.

    Raises:
        StoreError: no such model, no access, no network, or too little free disk.
    """
    patterns = _WEIGHT_FILES if weights else _PLAN_FILES
    try:
        if weights:
            _check_disk(model, patterns)
        return Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise StoreError(
            f"The Hugging Face model {model} needs permission. Ask for access on its page, then log in with "
            "`hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise StoreError(
            f"{model} is neither a folder here nor a model on the Hugging Face hub that you can see. Check the "
            "spelling; for a private model log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise StoreError(
            f"{model} is not a folder here, and it could not be downloaded: the Hugging Face hub cannot be reached, or "
            "offline mode is on, and no copy of it is in the cache. Connect, or give a folder."
        ) from error
    except (_HTTPError, OSError) as error:
        raise StoreError(
            f"{model} could not be downloaded from the Hugging Face hub: {error}. Run the command again; it continues "
            "where it stopped."
        ) from error


def _check_disk(model: str, patterns: list[str]) -> None:
    try:
        files = snapshot_download(model, allow_patterns=patterns, dry_run=True)
    except (DryRunError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return  # The hub cannot be reached, so nothing will be downloaded: what is in the cache has to do.
    needed = sum(int(file.file_size or 0) for file in files if file.will_download)
    check_free(Path(constants.HF_HUB_CACHE), needed, f"Downloading {model}")
