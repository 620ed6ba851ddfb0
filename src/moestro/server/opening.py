"""Opens a model for many requests at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moestro.calibration import pack_apart
from moestro.config import RuntimeOptions
from moestro.engine.llm import LLM
from moestro.engine.throughput import most_at_once
from moestro.runtime.subject import Subject
from moestro.store.locate import locate
from moestro.store.pack import PackProgress
from moestro.store.reader import Store

MOST_BY_ITSELF = 16
"""Requests at once where nobody says how many."""


def open_for_serving(
    model: str, options: RuntimeOptions, *, max_concurrency: int, guides: bool, progress: Callable[[PackProgress], None]
) -> LLM:
    """The model with room for `max_concurrency` requests (0: as many as make a token cheapest). Raises MoestroError."""
    if max_concurrency:
        return LLM(model, options=replace(options, max_sequences=max_concurrency), progress=progress, guides=guides)
    store = Store.open(locate(model, auto_pack=options.auto_pack, pack=pack_apart, progress=progress))
    chosen = most_at_once(Subject.of_store(store), options, most=MOST_BY_ITSELF)
    return LLM(store.path, options=chosen, progress=progress, guides=guides)
