"""moestro runs mixture-of-experts language models that do not fit in memory.

from moestro import LLM, SamplingParams

with LLM("path-or-id", memory="512MiB") as llm:
    print(llm.generate("Once upon a time")[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moestro.config import RuntimeOptions, SamplingParams
from moestro.errors import MoestroError

if TYPE_CHECKING:
    from moestro.engine.llm import LLM
    from moestro.engine.results import Completion, Delta, Stats, Timings

__version__ = "0.1.0"

__all__ = ["LLM", "Completion", "Delta", "MoestroError", "RuntimeOptions", "SamplingParams", "Stats", "Timings"]

_LAZY = {
    "LLM": "moestro.engine.llm",
    "Completion": "moestro.engine.results",
    "Delta": "moestro.engine.results",
    "Stats": "moestro.engine.results",
    "Timings": "moestro.engine.results",
}


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds; `moestro --help` needs neither.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
