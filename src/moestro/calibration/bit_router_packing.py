"""Gives a packed store its bit router."""

from __future__ import annotations

from collections.abc import Callable

from moestro.bit_router import BIT_ROUTER_FILE, load_bit_router, save_bit_router
from moestro.calibration.bit_router import BitRouterTraining, train_bit_router
from moestro.calibration.levels_model import LevelsModel
from moestro.calibration.text import load_tokenizer, make_windows, read_text
from moestro.errors import PackError, StoreError
from moestro.hf.skeleton import build_skeleton, config_from_dict
from moestro.kernels import make_kernels
from moestro.policy.levels import LevelTable
from moestro.runtime.levels import level_table, levels_up_to
from moestro.runtime.open import layouts_of
from moestro.runtime.probe import probe
from moestro.store.reader import Store
from moestro.store.workers import one_torch_thread, worker_count

_TOKENS = 32768
_CONTEXT = 512


def add_bit_router(
    store: Store,
    *,
    text: str = "",
    training: BitRouterTraining | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> None:
    """Train a bit router on a text file (empty: the shipped sample) unless the store has one; one that cannot be used
    is replaced.

    Raises:
        PackError: the text or the store's tokenizer cannot be used, the store was packed without calibration, or the
            machine has too little memory.
        StoreError: the store is damaged, or the file cannot be written.
    """
    table = _table(store)
    if _has_one(store):
        return
    tokenizer = load_tokenizer(store.path)
    if tokenizer is None:
        raise PackError(
            f"{store.path} has no tokenizer that can be loaded, so no bit router can be trained. Put the model's "
            "tokenizer files beside the checkpoint and pack it again, or leave --bit-router out."
        )
    source = read_text(text)
    model = LevelsModel(store, make_kernels("auto", threads=worker_count()))
    windows = make_windows(source, tokenizer, context=_CONTEXT, vocabulary=model.vocabulary, tokens=_TOKENS)
    # Products this small are slower on several threads, and the net is the same however many there are.
    with one_torch_thread():
        router = train_bit_router(model, table, windows.sequences, training, progress=progress)
    try:
        save_bit_router(store.path / BIT_ROUTER_FILE, router)
    except OSError as error:
        raise StoreError(
            f"The bit router could not be written to {store.path}: {error.strerror or error}. Mend the cause and run "
            "the same command again."
        ) from error


def _table(store: Store) -> LevelTable:
    facts = store.manifest.calibration
    if facts is None or facts.sensitivity is None:
        raise PackError(
            f"{store.path} was packed without calibration, whose findings a bit router starts from. Pack the model "
            "again without --no-calibration, or leave --bit-router out."
        )
    exact = store.manifest.exact_level
    skeleton = build_skeleton(config_from_dict(store.config_dict))
    picks = max(probe(skeleton, rows=2, history=2, logit_rows=1).experts_per_token)
    return level_table(store, layouts_of(store, exact), bits=levels_up_to(store, exact), picks=picks)


def _has_one(store: Store) -> bool:
    if not (store.path / BIT_ROUTER_FILE).exists():
        return False
    try:
        load_bit_router(
            store.path / BIT_ROUTER_FILE,
            layers=len(store.layers),
            hidden=int(config_from_dict(store.config_dict).hidden_size),
            experts=max(layer.num_experts for layer in store.layers),
            levels=levels_up_to(store, store.manifest.exact_level),
        )
    except StoreError:
        return False
    return True
