"""Open a model for the commands that run one, with a progress bar when it has to be packed first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moestro.cli.console import progress_bar
from moestro.config import PackOptions, RuntimeOptions

if TYPE_CHECKING:
    from moestro import LLM


def locate_store(model: str, *, auto_pack: bool) -> Path:
    """The folder of the model's store, packed now if need be. Raises MoestroError."""
    from moestro.store.locate import locate

    with progress_bar("packing") as report:
        return locate(model, auto_pack=auto_pack, progress=lambda step: report(step.done_bytes, step.total_bytes))


def locate_raw_store(model: str, *, auto_pack: bool) -> Path:
    """The folder of a store with the model's weights as they are, packed now if need be. Raises MoestroError.

    A store is taken as it is, whatever it holds.
    """
    from moestro.store.locate import locate

    with progress_bar("packing") as report:
        return locate(
            model,
            auto_pack=auto_pack,
            options=PackOptions(levels="raw"),
            progress=lambda step: report(step.done_bytes, step.total_bytes),
        )


def open_llm(model: str, options: RuntimeOptions) -> LLM:
    """The model within its budget. Raises MoestroError."""
    from moestro import LLM

    with progress_bar("packing") as report:
        return LLM(model, options=options, progress=lambda step: report(step.done_bytes, step.total_bytes))
