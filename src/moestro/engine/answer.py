"""The text of a request, as its tokens come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moestro.domain import Choice
from moestro.engine.detokenize import Detokenizer
from moestro.engine.results import Completion, Timings, TokenLogprob
from moestro.engine.sequence import Sequence
from moestro.engine.stop_strings import StopStrings
from moestro.engine.token_text import TokenTexts


@dataclass(frozen=True)
class News:
    """A piece of an answer: text that has become certain, new tokens, and their log-probabilities if asked for."""

    text: str
    token_ids: list[int]
    logprobs: tuple[TokenLogprob, ...]


class Answer:
    """Follows one sequence. `text` is what has become certain of it so far, `choice` who answers where that was left to
    the router of domains."""

    def __init__(self, sequence: Sequence, tokenizer: PreTrainedTokenizerBase, texts: TokenTexts) -> None:
        self.sequence = sequence
        self.choice: Choice | None = None
        self.text = ""
        self._texts = texts
        self._stop = StopStrings(sequence.sampling.stop)
        self._detokenizer = Detokenizer(tokenizer, skip_special=sequence.sampling.skip_special_tokens)
        self._told_text = 0
        self._told_tokens = 0
        self._decoded = 0
        self._ended = False
        if sequence.sampling.stop:
            sequence.listener = self._stops

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether tokens have come since `news` was last called."""
        return self._told_tokens < len(self.sequence.token_ids)

    def whole_text(self) -> str:
        """The text of an answer that has ended."""
        assert self.finished
        self._end()
        return self.text

    def news(self) -> News:
        """What has come since the last call."""
        self._decode()
        if self.finished:
            self._end()
        text, tokens = self.text[self._told_text :], self.sequence.token_ids[self._told_tokens :]
        news = News(text, tokens, self.logprobs(self._told_tokens))
        self._told_text, self._told_tokens = len(self.text), len(self.sequence.token_ids)
        return news

    def logprobs(self, first: int = 0) -> tuple[TokenLogprob, ...]:
        """Those of the tokens from number `first` on, empty where the request did not ask for them."""
        return tuple(
            self._logprob(one.token, one.logprob, tuple(self._logprob(*other) for other in one.top))
            for one in self.sequence.likelihoods[first:]
        )

    def _logprob(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = self._texts.data(token)
        return TokenLogprob(token, data.decode("utf-8", "replace"), data, logprob, top)

    def _stops(self) -> bool:
        """Whether the answer ends with the token that has just come."""
        self._decode()
        return self._stop.found

    def _decode(self) -> None:
        """Without stop strings only when somebody wants the text: steps need not wait for it."""
        for token in self.sequence.token_ids[self._decoded :]:
            self.text += self._stop.push(self._detokenizer.push(token))
        self._decoded = len(self.sequence.token_ids)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._decode()
            self.text += self._stop.push(self._detokenizer.finish()) + self._stop.finish()


def raise_error(answers: Iterable[Answer]) -> None:
    """Raise the first error that one of the answers has ended with."""
    for answer in answers:
        if answer.sequence.error is not None:
            raise answer.sequence.error


def completion_of(answer: Answer, load_s: float) -> Completion:
    """All of an answer that has ended without an error; opening its model took `load_s` seconds."""
    sequence, text = answer.sequence, answer.whole_text()
    assert sequence.finish_reason is not None
    assert sequence.first_token_at is not None
    assert sequence.finished_at is not None
    prefill_s = sequence.first_token_at - sequence.started_at
    decode_s = sequence.finished_at - sequence.first_token_at
    decoded = sequence.sampled - 1
    return Completion(
        text=text,
        token_ids=list(sequence.token_ids),
        finish_reason=sequence.finish_reason,
        prompt_tokens=len(sequence.prompt_ids),
        cached_tokens=sequence.reused,
        logprobs=answer.logprobs(),
        choice=answer.choice,
        routed_experts=sequence.routed_experts,
        timings=Timings(
            load_s=load_s,
            ttft_s=sequence.first_token_at - sequence.submitted_at,
            decode_tokens_per_s=decoded / decode_s if decoded and decode_s else 0.0,
            prefill_tokens_per_s=(len(sequence.prompt_ids) - sequence.reused) / prefill_s if prefill_s else 0.0,
        ),
    )
