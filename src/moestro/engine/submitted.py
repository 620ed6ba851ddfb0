"""A request as a service sees it: who listens to it, and what that listener has been told."""

from __future__ import annotations

from collections.abc import Callable

from moestro.engine.answer import Answer
from moestro.engine.events import Event, Phase, RequestState, RequestTimings, Usage
from moestro.engine.sequence import Sequence


class Submitted:
    """A request in a service. `id` is its name there; `deadline` in seconds of time.perf_counter."""

    def __init__(
        self, name: str, answer: Answer, on_event: Callable[[Event], None], *, deadline: float | None = None
    ) -> None:
        self.id, self.answer, self.on_event, self.deadline = name, answer, on_event, deadline
        self._told_prompt = 0
        self._over = False

    @property
    def generated_tokens(self) -> int:
        return len(self.answer.sequence.token_ids)

    def news(self) -> Event | None:
        """What has come since the last call, None where nothing has."""
        sequence = self.answer.sequence
        done = min(sequence.cached, len(sequence.prompt_ids))
        if self._over or not (self.answer.has_news or self.answer.finished or done > self._told_prompt):
            return None
        self._told_prompt, self._over = max(done, self._told_prompt), self.answer.finished
        news = self.answer.news()
        return Event(
            text=news.text,
            token_ids=tuple(news.token_ids),
            logprobs=news.logprobs,
            prompt_done_tokens=self._told_prompt,
            finish_reason=sequence.finish_reason,
            error=sequence.error,
            usage=_usage(sequence) if self._over else None,
            timings=_timings(sequence) if self._over else None,
            routed_experts=sequence.routed_experts if self._over else None,
        )


def state_of(one: Submitted, now: float) -> RequestState:
    """A line of a snapshot; the service's thread may be at work on the request meanwhile."""
    sequence = one.answer.sequence
    phase = Phase.DECODE if sequence.token_ids else Phase.PREFILL if sequence.started_at else Phase.WAITING
    return RequestState(
        id=one.id,
        phase=phase,
        priority=sequence.priority,
        prompt_tokens=len(sequence.prompt_ids),
        prompt_done_tokens=min(sequence.cached, len(sequence.prompt_ids)),
        generated_tokens=len(sequence.token_ids),
        age_s=now - sequence.submitted_at,
    )


def _usage(sequence: Sequence) -> Usage:
    return Usage(len(sequence.prompt_ids), sequence.reused, len(sequence.token_ids))


def _timings(sequence: Sequence) -> RequestTimings:
    assert sequence.finished_at is not None
    submitted, ended = sequence.submitted_at, sequence.finished_at
    started = sequence.started_at or ended
    first = sequence.first_token_at or ended
    return RequestTimings(
        queue_s=started - submitted,
        prefill_s=first - started,
        decode_s=ended - first,
        ttft_s=first - submitted,
        total_s=ended - submitted,
    )
