"""One request on its way: its tokens, how far its prompt is processed, why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from moestro.config import SamplingParams
from moestro.engine.likeness import sketch
from moestro.engine.logprobs import TokenLikelihood
from moestro.engine.routed import RoutedExperts, RoutingLog
from moestro.engine.sampling import Sampler
from moestro.errors import MoestroError, RequestError
from moestro.runtime.batch import BASE

if TYPE_CHECKING:
    from moestro.engine.prefixes import NamedBlock
    from moestro.runtime.open_variant import OpenVariant


@dataclass
class Sequence:
    """A request in flight. `cached` counts tokens whose KV rows are written, `reused` those of the prompt that had
    been there before; `sampled` counts also an end-of-text token.

    `variant` is what it runs on, None for the base. `budget`: nats that each of its tokens may lose to lower levels.
    `listener` is told of each token of the answer and says whether the answer ends with it. `chain` are the first of
    its `blocks`, which others may use too; `yielded` says that it gave up its place once. `routing` is told of the
    experts of its tokens, if it wants to know. Times in seconds of time.perf_counter.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    sampler: Sampler
    number: int = -1
    budget: float = 0.0
    priority: int = 0
    variant: OpenVariant | None = None
    token_ids: list[int] = field(default_factory=list)
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    chain: list[NamedBlock] = field(default_factory=list)
    cached: int = 0
    reused: int = 0
    yielded: bool = False
    finish_reason: str | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None
    sampled: int = 0
    error: MoestroError | None = None
    listener: Callable[[], bool] | None = None
    routing: RoutingLog | None = None

    @property
    def variant_serial(self) -> int:
        """A number that no other variant ever has, 0 for the base."""
        return 0 if self.variant is None else self.variant.serial

    @property
    def slot(self) -> int:
        """The number of its variant while it runs, `BASE` for none."""
        if self.variant is None:
            return BASE
        assert self.variant.slot is not None
        return self.variant.slot

    @property
    def routed_experts(self) -> RoutedExperts | None:
        """What its tokens were routed to, None where nobody asked or nothing was computed."""
        return None if self.routing is None else self.routing.taken()

    @property
    def most_rows(self) -> int:
        """Rows of KV cache that the request can come to need; the last token is never fed back."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1

    @cached_property
    def sketch(self) -> np.ndarray:
        """What its likeness to others is told by."""
        return sketch(self.prompt_ids)

    def pending(self, limit: int) -> list[int]:
        """The next tokens to feed, at most `limit`: the rest of the prompt, or the last token."""
        return self.tokens(self.cached, min(self.known_tokens, self.cached + limit))

    @property
    def known_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt_ids) + len(self.token_ids)

    def tokens(self, first: int, end: int) -> list[int]:
        """Those at these places of the prompt and the answer so far, both seen as one."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[first:end], *self.token_ids[max(0, first - prompt) : max(0, end - prompt)]]

    def is_complete_after(self, rows: int) -> bool:
        """Whether feeding `rows` more tokens reaches the last known one, so that the next can be sampled."""
        return self.cached + rows == self.known_tokens

    def pick(self, logits_V: torch.Tensor, end_ids: frozenset[int]) -> None:
        """Take the next token from its logits; a guide that allows none ends the request with an error."""
        try:
            token = self.sampler.pick(logits_V)
        except RequestError as error:
            self.fail(error)
            return
        self.append(token, end_ids, self.sampler.likelihood(logits_V, token))

    def append(self, token: int, end_ids: frozenset[int], likelihood: TokenLikelihood | None = None) -> None:
        """Take a sampled token and decide whether the request ends with it."""
        now = time.perf_counter()
        self.sampled += 1
        if self.first_token_at is None:
            self.first_token_at = now
        if (token in end_ids and not self.sampling.ignore_eos) or token in self.sampling.stop_token_ids:
            self._finish("stop", now)
            return
        self.token_ids.append(token)
        if likelihood is not None:
            self.likelihoods.append(likelihood)
        heard = self.listener is not None and self.listener()
        if heard or self.sampler.complete:
            self._finish("stop", now)
        elif len(self.token_ids) >= self.sampling.max_tokens:
            self._finish("length", now)

    def fail(self, error: MoestroError) -> None:
        """End the request with an error."""
        self.error = error
        self.end("error")

    def end(self, reason: str) -> None:
        """End the request, unless it has ended."""
        if self.finish_reason is None:
            self._finish(reason, time.perf_counter())

    def _finish(self, reason: str, now: float) -> None:
        self.finish_reason = reason
        self.finished_at = now
