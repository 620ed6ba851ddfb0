"""The text that a variant's codes are found with."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from moestro.calibration.text import TOKENS, Windows, load_tokenizer, make_windows, read_text
from moestro.config import VariantOptions
from moestro.errors import PackError, VariantError
from moestro.store.calibration_facts import CalibrationText
from moestro.store.reader import Store

_FEW = 4


@dataclass(frozen=True)
class VariantText:
    """Token sequences and where they come from; None where there are none."""

    windows: Windows | None = None
    facts: CalibrationText | None = None
    warnings: tuple[str, ...] = ()


def calibration_text(store: Store, options: VariantOptions) -> VariantText:
    """The text that the options name, as tokens of the store.

    Raises:
        VariantError: it cannot be used.
    """
    if not options.calibration:
        return VariantText()
    tokenizer = load_tokenizer(store.path)
    if tokenizer is None:
        missing = f"{store.path} has no tokenizer that can be loaded, so no text can be run through the fine-tune"
        if options.calibrate or options.distill_steps:
            raise VariantError(
                f"{missing}. Leave calibrate and distill_steps out, or pack the base with its tokenizer."
            )
        logging.getLogger("moestro").warning("%s: codes are found from the weights alone.", missing)
        return VariantText(warnings=("not calibrated: the store has no tokenizer",))
    config = store.config_dict
    context = int(config.get("max_position_embeddings") or TOKENS)
    try:
        text = read_text(options.calibrate)
        windows = make_windows(text, tokenizer, context=context, vocabulary=int(config["vocab_size"]))
    except PackError as error:
        raise VariantError(str(error)) from error
    warnings: tuple[str, ...] = ()
    if windows.tokens * _FEW < TOKENS:
        warnings = (f"calibrated on {windows.tokens} tokens only, {TOKENS} are usual",)
    return VariantText(windows, text.facts, warnings)
