"""Packing as users know it: with a calibration text unless the options say otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from moestro.calibration.bit_router_packing import add_bit_router
from moestro.calibration.calibrator import Calibrator
from moestro.calibration.text import TOKENS, load_tokenizer, make_windows, read_text
from moestro.config import PackOptions
from moestro.errors import PackError
from moestro.hf.skeleton import load_config
from moestro.store import pack as store_pack
from moestro.store.data_free import DataFree
from moestro.store.expert_work import ExpertEncoder
from moestro.store.pack import PackLimits, PackProgress
from moestro.store.reader import Store

_FEW = 4


def pack(
    source: Path,
    destination: Path,
    *,
    options: PackOptions | None = None,
    progress: Callable[[PackProgress], None] | None = None,
    limits: PackLimits | None = None,
) -> Store:
    """Pack the checkpoint folder `source` into a store at `destination`, or return the store that is already there.

    With `bit_router` in the options a bit router is trained for either, unless it has one that can be used.

    Raises:
        PackError: the calibration text cannot be used.
        CheckpointError, UnsupportedModelError, StoreError: as `moestro.store.pack.pack`.
    """
    store = store_pack.pack(
        source, destination, options=options, make_encoder=make_encoder, progress=progress, limits=limits
    )
    if options is not None and options.bit_router:
        add_bit_router(store, text=options.calibrate, progress=_in_steps(progress))
    return store


def _in_steps(progress: Callable[[PackProgress], None] | None) -> Callable[[int, int], None]:
    """Steps of training as progress of the pack."""
    return lambda done, total: progress(PackProgress(done, total, "training the bit router")) if progress else None


def make_encoder(source: Path, options: PackOptions) -> ExpertEncoder:
    """Who finds the codes of the experts in the checkpoint folder `source`.

    Raises:
        PackError: the calibration text cannot be used.
    """
    if options.is_raw or not options.calibration:
        return DataFree()
    text = read_text(options.calibrate)
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        missing = f"{source} has no tokenizer that can be loaded, so no text can be run through the model"
        if options.calibrate:
            raise PackError(f"{missing}. Put the model's tokenizer files there, or leave --calibrate out.")
        logging.getLogger("moestro").warning("%s: its experts are quantised from their weights alone.", missing)
        return DataFree(warnings=("not calibrated: the checkpoint has no tokenizer",))
    context = int(getattr(config, "max_position_embeddings", None) or TOKENS)
    windows = make_windows(text, tokenizer, context=context, vocabulary=int(config.vocab_size))
    warnings: tuple[str, ...] = ()
    if windows.tokens * _FEW < TOKENS:
        warnings = (f"calibrated on {windows.tokens} tokens only, {TOKENS} are usual",)
    return Calibrator(text.facts, windows, warnings=warnings)
