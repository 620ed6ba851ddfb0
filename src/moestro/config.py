"""Every option a user can set, once: flags, `MOESTRO_*` environment variables and docs derive from here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moestro.errors import BudgetError, MoestroError, RequestError


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field whose `help` text is shown by the command line and the docs."""
    return field(default=default, metadata={"help": help, **extra})


def check_types(options: Any, error: type[MoestroError]) -> None:
    """Raise `error` for a field whose value is not of the type it is declared with (a whole number may be a float)."""
    for one in fields(options):
        value, wanted = getattr(options, one.name), type(one.default)
        accepted = (int, float) if wanted is float else wanted
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            raise error(f"{one.name} is {value!r}, expected a value of type {wanted.__name__}.")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How a model is opened. Environment twins: `MOESTRO_MEMORY`, `MOESTRO_CONTEXT`, ..."""

    memory: str = option("50%", "Bytes for dense weights, experts, KV cache and activations: 512MiB, 2GB, 25%.")
    context: int = option(0, "Longest prompt plus answer in tokens (0: the model's own limit, at most 4096).")
    max_sequences: int = option(1, "Sequences that may be in flight at once; each has a KV cache of `context` tokens.")
    threads: int = option(0, "Compute threads (0: one per available core).")
    level: int = option(0, "Bits of each expert that are read and applied, of the store's levels (0: its exact level).")
    policy: str = option("lru", "Which planes leave the cache first.")
    auto_pack: bool = option(True, "Pack a checkpoint into the cache folder when there is no store of it yet.")

    def __post_init__(self) -> None:
        check_types(self, BudgetError)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens. Environment twins: `MOESTRO_MAX_TOKENS`, `MOESTRO_TEMPERATURE`, ...

    The tokens are a function of the model, the prompt and these values alone, whatever else is in flight.
    """

    max_tokens: int = option(128, "Most new tokens.")
    temperature: float = option(0.0, "0 picks the likeliest token; higher is more random.")
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this much probability.")
    top_k: int = option(0, "Sample from this many likeliest tokens (0: all).")
    seed: int = option(0, "Seed of this request's random numbers.")
    ignore_eos: bool = option(False, "Go on after the end-of-text token.")

    def __post_init__(self) -> None:
        check_types(self, RequestError)
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}, expected a whole number of at least 1.")
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(f"temperature is {self.temperature}, expected a number from 0 to 100.")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}, expected a number above 0 and at most 1.")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}, expected 0 (all tokens) or a positive whole number.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1.")
