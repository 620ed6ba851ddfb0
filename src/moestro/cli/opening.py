"""Open a model for the commands that run one, with a progress bar when it has to be packed first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.cli.console import pack_bar
from moestro.config import PackOptions, RuntimeOptions

if TYPE_CHECKING:
    from moestro import LLM


def locate_store(model: str, *, auto_pack: bool, raw: bool = False) -> Path:
    """The folder of the model's store, packed now if need be. Raises MoestroError.

    With `raw` a checkpoint is packed with its weights as they are; a store is taken as it is, whatever it holds.
    """
    from moestro.calibration import pack_apart
    from moestro.store.locate import AUTOMATIC, locate

    with pack_bar("packing") as report:
        return locate(
            model,
            auto_pack=auto_pack,
            pack=pack_apart,
            options=PackOptions(levels="raw") if raw else AUTOMATIC,
            progress=report,
        )


def split_model(model: str, options: RuntimeOptions) -> tuple[str, RuntimeOptions]:
    """The model of MODEL:VARIANT, and the options with that variant."""
    from moestro.store.variant_name import split_variant

    name, variant = split_variant(model)
    return name, replace(options, variant=variant or options.variant)


def open_llm(model: str, options: RuntimeOptions) -> LLM:
    """The model within its budget. Raises MoestroError."""
    from moestro import LLM

    with pack_bar("packing") as report:
        return LLM(model, options=options, progress=report)
