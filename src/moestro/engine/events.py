"""What a service tells about its requests: events as they happen, and a snapshot of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from moestro.engine.results import Stats, TokenLogprob
from moestro.engine.routed import RoutedExperts
from moestro.errors import MoestroError


class Phase(Enum):
    """How far a request is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of which `cached_tokens` were not computed again, and of the answer."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class RequestTimings:
    """Seconds. From submission: `queue_s` until the first step, `ttft_s` to the first token, `total_s` to the end.

    `prefill_s` from the first step to the first token, `decode_s` from there to the end; 0 for what never came.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True)
class Event:
    """Something new about one request.

    `text` has become certain (empty while a stop string or a character's bytes are incomplete), `token_ids` are new and
    `logprobs` theirs, if asked for; `prompt_done_tokens` of the prompt have been processed. The last event of a request
    alone has a `finish_reason`: "stop", "length", "cancelled", "deadline" or "error" (then `error` says which), and
    with it `usage`, `timings` and `routed_experts`, if asked for.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_done_tokens: int = 0
    finish_reason: str | None = None
    error: MoestroError | None = None
    usage: Usage | None = None
    timings: RequestTimings | None = None
    routed_experts: RoutedExperts | None = None


@dataclass(frozen=True)
class RequestState:
    """One request of a snapshot: how far it is, its tokens so far."""

    id: str
    phase: Phase
    priority: int
    prompt_tokens: int
    prompt_done_tokens: int
    generated_tokens: int
    age_s: float


@dataclass(frozen=True)
class ServiceSnapshot:
    """A service at a moment. Token counts are since the service began; `levels_LE` as of `LLM.residency`.

    `kv_blocks_kept`: of those not used by a request, hold rows of a prefix that may come again.
    """

    requests: tuple[RequestState, ...]
    stats: Stats
    levels_LE: np.ndarray
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_kept: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: dict[str, int]
    accepting: bool

    @property
    def waiting(self) -> int:
        """Requests that no step has taken up yet."""
        return sum(one.phase is Phase.WAITING for one in self.requests)

    @property
    def running(self) -> int:
        return len(self.requests) - self.waiting
