"""The loop that turns waiting requests into tokens, one packed forward pass a step."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import numpy as np

from moestro.config import SamplingParams
from moestro.engine.prefixes import Prefixes
from moestro.engine.routed import RoutingLog
from moestro.engine.sampling import Constraint, Sampler
from moestro.engine.scheduler import Scheduler
from moestro.engine.sequence import Sequence
from moestro.errors import PlaneReadError, RequestError
from moestro.policy.levels import EXACT, budget_of
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.runner import ModelRunner
from moestro.runtime.shares import MemoryShares
from moestro.spans import Event, Part

ROUTED_TOKENS = 256
"""Of a prompt, most that `Engine.route` looks at: experts' shares change little after them."""

_NOBODY = -1
"""The number of a request that there is not."""


@dataclass(frozen=True)
class KVUse:
    """Blocks in all, those that requests use, and those beside them that are kept for prefixes that may come again."""

    blocks: int
    used: int
    kept: int


class Engine:
    """Requests in, tokens out. Knows no text and no planes. Not thread-safe.

    `quality` is that of requests that ask for none, `level_policy` what it is spent by. `prefix_cache`: KV rows of what
    requests begin with are kept and shared. `shares`: what KV blocks and experts trade by, if they do. `alike`:
    requests that share tokens run together.
    """

    def __init__(
        self,
        *,
        runner: ModelRunner,
        max_sequences: int,
        step_rows: int,
        context: int,
        end_ids: frozenset[int],
        vocabulary: int,
        quality: str = EXACT,
        level_policy: str = "fixed",
        prefix_cache: bool = False,
        shares: MemoryShares | None = None,
        alike: bool = False,
    ) -> None:
        self._quality, self._level_policy = quality, level_policy
        self._runner, self._shares = runner, shares
        self._prefixes = Prefixes(runner.kv, keep=prefix_cache, shares=shares)
        self._variants = runner.variants
        self._scheduler = Scheduler(
            prefixes=self._prefixes,
            max_sequences=max_sequences,
            step_rows=step_rows,
            variants=self._variants,
            alike=alike,
        )
        self._context, self._step_rows = context, step_rows
        self._end_ids = end_ids
        self._vocabulary = vocabulary
        self._submitted = 0

    def submit(self, prompt_ids: List[int], sampling: SamplingParams, *, variant: str = "") -> Sequence:
        """Queue a request. Raises as `prepare`."""
        sequence = self.prepare(prompt_ids, sampling, variant=variant)
        self.add(sequence)
        return sequence

    def prepare(
        self,
        prompt_ids: List[int],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        *,
        variant: str = "",
    ) -> Sequence:
        """A request, checked and not queued yet. Any thread may ask for it. It ends at the end of the context at the
        latest. `constraint` is what its `guide` comes to, `variant` the name of what it runs on (empty: the base).

        Raises:
            RequestError: the prompt is empty, holds ids outside the vocabulary, or does not fit the context; or
                there is no such quality.
            VariantError: there is no such variant, or it is damaged.
            BudgetError: there can never be room for it.
        """
        self._check(prompt_ids)
        self._check_tokens(sampling)
        budget = budget_of(self._level_policy, sampling.quality or self._quality)
        room = self._context - len(prompt_ids)
        return Sequence(
            prompt_ids=list(prompt_ids),
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            sampler=Sampler(sampling, prompt_ids, constraint),
            budget=budget,
            variant=self._variants.open(variant) if variant else None,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a request that has been prepared."""
        sequence.number = self._submitted
        self._submitted += 1
        if sequence.sampling.return_routed_experts:
            sequence.routing = self._runner.routing_logs[sequence.number] = RoutingLog()
        self._scheduler.add(sequence)

    def step(self) -> list[Sequence]:
        """One forward pass; returns the requests that got a token or ended.

        A plane that cannot be read ends the requests that need it, with `error` set; the others go on.
        """
        with self._runner.spans.within(Part.PYTHON, Event.STEP):
            return self._step()

    def _step(self) -> list[Sequence]:
        failed = self._scheduler.admit()
        if not self._scheduler.running:
            return failed
        batch, sampled = self._scheduler.next_step()
        try:
            logits_SV = self._runner.forward(batch)
        except PlaneReadError as error:
            failed += self._scheduler.fail(batch, error)
            self._retire()
            return failed
        self._scheduler.commit(batch)
        self._runner.spans.begin(Part.PYTHON)
        for sequence, logits_V in zip(sampled, logits_SV, strict=True):
            sequence.pick(logits_V, self._end_ids)
        self._runner.spans.end(Event.SAMPLE, len(sampled))
        self._retire()
        return failed + sampled

    def route(self, prompt_ids: List[int], layers: int) -> np.ndarray | None:
        """Experts [N, layers, K] that the base picks for a prompt's first tokens in its first MoE layers.

        Between two steps, without a request. N is at most `ROUTED_TOKENS` and what a step and the context take. None
        where there is no room for their KV rows now.

        Raises:
            RequestError: the prompt is empty, or begins with ids outside the vocabulary.
            PlaneReadError: a plane that this needs could not be read.
        """
        tokens = list(prompt_ids[: min(ROUTED_TOKENS, self._step_rows, self._context - 1)])
        self._check(tokens)
        with self._prefixes.borrowed(len(tokens)) as blocks:
            if blocks is None:
                return None
            return self._runner.route(PackedBatch([Segment(_NOBODY, tokens, 0, blocks, False)]), layers)

    def cancel(self, sequence: Sequence) -> None:
        """Take a request out at any moment and free what it holds. One that has not ended is cancelled."""
        sequence.end("cancelled")
        self._scheduler.drop(sequence)
        self._runner.end_request(sequence.number)

    @property
    def kv_use(self) -> KVUse:
        """How the KV blocks are used. Any thread may ask."""
        return KVUse(self._runner.kv.blocks, self._prefixes.used, self._prefixes.kept)

    def forget(self) -> None:
        """Drop every expert in memory and the prefixes that nobody uses, between two steps."""
        self._runner.planes.clear()
        self._prefixes.forget()
        self._variants.release()

    def resize(self, memory_bytes: int) -> None:
        """Make the number of bytes another one, between two steps. Raises BudgetError as `MemoryShares.resize`."""
        assert self._shares is not None
        self._shares.resize(memory_bytes)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.busy

    def _retire(self) -> None:
        for sequence in self._scheduler.retire():
            self._runner.end_request(sequence.number)

    def _check_tokens(self, sampling: SamplingParams) -> None:
        for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias or ())):
            beyond = [token for token in ids if token >= self._vocabulary]
            if beyond:
                raise RequestError(
                    f"{name} names token {beyond[0]}, and the model's vocabulary ends at {self._vocabulary - 1}."
                )

    def _check(self, prompt_ids: List[int]) -> None:
        if not prompt_ids:
            raise RequestError("The prompt is empty. Expected at least one token of text.")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocabulary:
            raise RequestError(
                f"The prompt holds token ids outside the model's vocabulary (0 to {self._vocabulary - 1})."
            )
        if len(prompt_ids) >= self._context:
            raise RequestError(
                f"The prompt has {len(prompt_ids)} tokens and the context holds {self._context}, of which at least one "
                "is for the answer. Shorten the prompt, or give a longer context if the model has one."
            )
