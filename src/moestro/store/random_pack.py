"""`moestro pack --random`: a store of random weights, from a config alone."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moestro.config import PackOptions
from moestro.errors import PackError
from moestro.hf.skeleton import build_skeleton, load_config
from moestro.store.assets import asset_paths, has_tokenizer
from moestro.store.checkpoint import read_config
from moestro.store.dtypes import config_dtype
from moestro.store.locate import BUILT_IN, locate_shapes, locate_source
from moestro.store.pack import PackLimits, PackProgress, pack
from moestro.store.random_weights import RandomCheckpoint, RandomCodes
from moestro.store.reader import Store

_CONFIG = "config.json"


def pack_random(
    config: str,
    destination: Path,
    *,
    options: PackOptions | None = None,
    seed: int = 0,
    progress: Callable[[PackProgress], None] | None = None,
    limits: PackLimits | None = None,
) -> Store:
    """Make a store of random weights: the shape, the layout and the bytes that packing a checkpoint would give.

    `config` is the path of a config.json, a folder that has one, or a Hugging Face id of which only small files are
    downloaded. The tokenizer beside it comes along; where there is none, that of the built-in model is taken, which
    is said as a warning. The same config, options and seed make the same bytes, after an interruption as well.

    Raises:
        PackError: the seed is not valid, or a calibration text was asked for.
        CheckpointError, UnsupportedModelError, StoreError: as `pack`, of the config.
    """
    options = options or PackOptions()
    if not 0 <= seed < 2**32:
        raise PackError(f"The seed of random weights is {seed}, expected a whole number from 0 to 2^32 - 1.")
    if options.calibrate:
        raise PackError(
            f"calibrate is {options.calibrate!r}, but random weights have nothing to calibrate. Leave one of them out."
        )
    if not options.is_raw:
        options = replace(options, calibration=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _gather(config, Path(temporary))
        wanted = load_config(folder)
        dtype = config_dtype(wanted)
        skeleton = build_skeleton(wanted)
        return pack(
            folder,
            destination,
            options=options,
            make_encoder=lambda *_: RandomCodes(skeleton, seed),
            open_checkpoint=lambda source: RandomCheckpoint(source, skeleton, dtype=dtype, seed=seed),
            progress=progress,
            limits=limits,
        )


def _gather(config: str, temporary: Path) -> Path:
    """A folder with the config and all small files that a store of it needs. Raises MoestroError."""
    path = Path(config).expanduser()
    source = path.absolute().parent if path.is_file() else locate_shapes(config)
    folder = temporary / (source.name or "model")
    folder.mkdir()
    for asset in asset_paths(source):
        shutil.copyfile(asset, folder / asset.name)
    if path.is_file():
        shutil.copyfile(path, folder / _CONFIG)
    if not has_tokenizer(folder):
        _borrow_tokenizer(config, folder)
    return folder


def _borrow_tokenizer(config: str, folder: Path) -> None:
    lender = locate_source(BUILT_IN[0])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(lender / name, folder / name)
    own = len(json.loads((lender / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    theirs = int(read_config(folder).get("vocab_size") or 0)
    logging.getLogger("moestro").warning(
        "There is no tokenizer beside %s: the store gets that of %s, which knows %d tokens; the model has %d. %s.",
        config,
        BUILT_IN[0],
        own,
        theirs,
        _MORE if own <= theirs else _FEWER,
    )


_MORE = "The others have no text"
_FEWER = "Prompts of text may have tokens that it does not know: give token ids"
