"""Options of commands that ask a server; users import them from `moestro.config`."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.errors import RequestError
from moestro.options import check_least, check_types, option


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How `chat` asks. Environment twins: `MOESTRO_SYSTEM`, `MOESTRO_MAX_TOKENS`, ...

    Raises:
        RequestError: a value is not valid.
    """

    system: str = option("", "What the assistant is told before the conversation.")
    max_tokens: int = option(1024, "Most tokens of an answer.")
    temperature: float = option(-1.0, "0 picks the likeliest token, higher is more random (-1: as its authors say).")
    seed: int = option(-1, "Seed of each answer's random numbers (-1: another one for each).")

    def __post_init__(self) -> None:
        check_types(self, RequestError)
        check_least(self, RequestError, max_tokens=1)
        if self.temperature != -1 and not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature is {self.temperature}, expected a number from 0 to 100, or -1.")
        if not -1 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1, or -1.")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What `bench-serve` asks of a server. Environment twins: `MOESTRO_REQUESTS`, `MOESTRO_RATE`, ...

    Raises:
        RequestError: a value is not valid.
    """

    requests: int = option(64, "Requests in all.")
    concurrency: int = option(4, "Clients, each of which sends its next request when the last is answered.")
    rate: float = option(0.0, "Requests per second, at random moments (Poisson), instead of --concurrency.")
    prompt_tokens: int = option(64, "Tokens of each prompt, of random ids (with --text: about so many).")
    text: str = option("", "Cut prompts from this file, four characters for a token; any server can be asked then.")
    max_tokens: int = option(64, "Tokens of each answer; it does not end before.")
    seed: int = option(0, "Seed of prompts, moments and sampling.")
    temperature: float = option(0.0, "0 picks the likeliest token; higher is more random.")
    ttft_slo: float = option(0.0, "Seconds to the first token within which an answer counts as good (0: any).")
    itl_slo: float = option(0.0, "Seconds between tokens, on average over an answer, within which it counts (0: any).")
    timeout: float = option(600.0, "Seconds after which an answer is given up.")

    def __post_init__(self) -> None:
        check_types(self, RequestError)
        check_least(self, RequestError, requests=1, concurrency=1, prompt_tokens=1, max_tokens=1)
        for name in ("rate", "seed", "temperature", "ttft_slo", "itl_slo", "timeout"):
            if not 0 <= getattr(self, name) < 1e9:
                raise RequestError(f"{name} is {getattr(self, name)}, expected a number of at least 0.")
