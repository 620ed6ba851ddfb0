"""Files of requests, one JSON object a line, and of their answers: what `generate --prompt-file F --out G` does.

Everything is checked before anything is computed. Answers are appended line by line in the order of the requests, so
that a run that was stopped goes on after the last whole line.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moestro.config import RuntimeOptions, SamplingParams
from moestro.domain import AUTO, Choice, load_router, router_path
from moestro.domain.examples import text_of_messages
from moestro.engine.llm import LLM, Request
from moestro.engine.results import Completion, Stats, TokenLogprob
from moestro.engine.throughput import options_for
from moestro.engine.tokenizer import chat_ids, encode, load_tokenizer
from moestro.errors import RequestError, RouteError, VariantError
from moestro.policy.levels import budget_of, parse_quality
from moestro.runtime.open import level_policy_of
from moestro.runtime.plan import resolve_context
from moestro.runtime.subject import Subject
from moestro.store.disk import write_all
from moestro.store.reader import Store
from moestro.store.variant_file import open_variant

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_KEYS = ("id", "prompt", "messages", "variant", *_SAMPLING)
_WINDOW = 4
"""Requests are brought into order of length among so many times `max_sequences` of them: further apart, answers would
have to wait long for those before them."""


@dataclass(frozen=True)
class BatchRequest:
    """One line. `prompt` is a text, or the messages of a conversation; `id` is the line's number where it has none;
    `variant` answers (None: the one that the model is opened with)."""

    line: int
    id: str | int
    prompt: str | list[dict[str, str]]
    sampling: SamplingParams
    variant: str | None = None


@dataclass(frozen=True)
class Done:
    """`done` of `total` answers are in the file."""

    done: int
    total: int


@dataclass(frozen=True)
class BatchReport:
    """What a run did: requests of the file, how many had been answered before, tokens and seconds of this run alone.

    `tokens_per_s` counts answers' tokens, over `elapsed_s`, which leaves out opening the model.
    """

    requests: int
    answered_before: int
    prompt_tokens: int
    tokens: int
    elapsed_s: float
    tokens_per_s: float
    max_sequences: int
    context: int
    stats: Stats | None


def read_requests(text: str, name: str, sampling: SamplingParams) -> list[BatchRequest]:
    """The requests of a file's text; empty lines are none. `sampling` is what a line does not say.

    Raises:
        RequestError: a line is not as expected (its number is named), or there is none.
    """
    requests = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                requests.append(_parse(line, number, sampling))
            except RequestError as error:
                raise RequestError(f"Line {number} of {name}: {error}") from error
    if not requests:
        raise RequestError(f'{name} holds no request. Expected one JSON object a line: {{"prompt": "..."}}.')
    return requests


def answer_file(
    store: Store,
    options: RuntimeOptions,
    requests: Sequence[BatchRequest],
    out: Path,
    *,
    name: str,
    chat: bool = False,
    timeline: Path | None = None,
    progress: Callable[[Done], None] | None = None,
) -> BatchReport:
    """Answer the requests of the file `name` and append the answers to `out`, in their order.

    `max_sequences` of the options is the least number of requests in flight, 0 for `context` what the longest needs.
    With `chat` prompts are wrapped in the model's chat template. `progress` is told of every step.

    Raises:
        RequestError: a prompt does not do, `out` holds something else than answers to these requests, or another
            process is writing it; nothing has been computed.
        PlaneReadError: a plane could not be read; what was answered before is in `out`.
    """
    with _Answers(out, requests, name) as answers:
        before = answers.count
        if before == len(requests):
            return BatchReport(before, before, 0, 0, 0.0, 0.0, 0, 0, None)
        todo, subject = requests[before:], Subject.of_store(store)
        _check_qualities(todo, level_policy_of(store, options), name)
        _check_variants(store, todo, name)
        prompts = _encoded(store, todo, name=name, chat=chat)
        _check_lengths(todo, prompts, resolve_context(subject.skeleton.config, options.context), name)
        guided = replace(options, guides=options.guides or any(one.sampling.guide for one in todo))
        chosen = options_for(subject, guided, prompts, [one.sampling for one in todo])
        with LLM(store.path, options=chosen) as llm:
            started = time.perf_counter()
            if timeline is None:
                done = _run(llm, requests, prompts, answers, progress)
            else:
                with llm.timeline(timeline):
                    done = _run(llm, requests, prompts, answers, progress)
            elapsed_s = time.perf_counter() - started
            return BatchReport(
                requests=len(requests),
                answered_before=before,
                prompt_tokens=sum(map(len, prompts)),
                tokens=done,
                elapsed_s=elapsed_s,
                tokens_per_s=done / elapsed_s,
                max_sequences=chosen.max_sequences,
                context=chosen.context,
                stats=llm.stats(),
            )


def _run(
    llm: LLM,
    requests: Sequence[BatchRequest],
    prompts: Sequence[list[int]],
    answers: _Answers,
    progress: Callable[[Done], None] | None,
) -> int:
    """Compute and write all answers that are missing; returns how many tokens they have."""
    first, tokens = answers.count, 0
    todo = requests[first:]
    order = by_length(
        [len(ids) + one.sampling.max_tokens for ids, one in zip(prompts, todo, strict=True)],
        _WINDOW * llm.options.max_sequences,
    )
    early: dict[int, Completion] = {}
    choices: dict[int, Choice] = {}

    def coming() -> Iterator[Request]:
        for place in order:
            one = todo[place]
            variant = llm.options.variant if one.variant is None else one.variant
            if variant == AUTO:
                choices[place] = llm.choose(_said(one.prompt))
                variant = choices[place].variant or ""
            yield prompts[place], one.sampling, variant

    for number, completion in llm.complete_each(coming()):
        early[order[number]] = replace(completion, choice=choices.get(order[number]))
        tokens += len(completion.token_ids)
        while (next_one := early.pop(answers.count - first, None)) is not None:
            answers.append(next_one)
        if progress is not None:
            progress(Done(answers.count, len(requests)))
    assert answers.count == len(requests)
    return tokens


def by_length(lengths: Sequence[int], window: int) -> list[int]:
    """Places in the order in which to begin: within each window the longest first, so that neighbours end together."""
    return [
        place
        for first in range(0, len(lengths), window)
        for place in sorted(range(first, min(first + window, len(lengths))), key=lambda one: -lengths[one])
    ]


class _Answers:
    """The file of answers, under a lock; `count` lines of it are whole. A cut last line is taken away, and said."""

    def __init__(self, path: Path, requests: Sequence[BatchRequest], name: str) -> None:
        self.count = 0
        self._path, self._requests, self._name = path, requests, name

    def __enter__(self) -> _Answers:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def append(self, completion: Completion) -> None:
        """Write the next answer: one call of the system for the whole line."""
        answer: dict[str, Any] = {
            "id": self._requests[self.count].id,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        }
        if completion.choice is not None:
            answer["choice"] = asdict(completion.choice)
        if completion.logprobs:
            answer["logprobs"] = [_logprob(one) for one in completion.logprobs]
        write_all(self._descriptor, (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        self.count += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"Another process is writing {self._path}. Wait until it is done.") from None

    def _read(self) -> None:
        whole = 0
        with open(self._path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check(line)
                whole += len(line)
                self.count += 1
        if whole < os.fstat(self._descriptor).st_size:
            logging.getLogger("moestro").warning(
                "The last line of %s had been cut and is written anew, after %d whole ones.", self._path, self.count
            )
            os.ftruncate(self._descriptor, whole)

    def _check(self, line: bytes) -> None:
        number = self.count + 1
        try:
            answer = json.loads(line)
            found = answer["id"], answer["text"], answer["finish_reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"Line {number} of {self._path} is no answer ({error!r}). Give --out another name, or take it away."
            ) from error
        if self.count >= len(self._requests) or found[0] != self._requests[self.count].id:
            raise RequestError(
                f"Line {number} of {self._path} answers {found[0]!r}, which is not request {number} of {self._name}: "
                "it holds answers to other requests. Give --out another name."
            )


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": one.id, "text": one.text, "bytes": list(one.data), "logprob": one.logprob}
    return shown | ({"top": [_logprob(other) for other in one.top]} if one.top else {})


def _parse(line: str, number: int, sampling: SamplingParams) -> BatchRequest:
    try:
        fact = json.loads(line)
    except ValueError as error:
        raise RequestError(f"it is not JSON ({error}).") from error
    if not isinstance(fact, dict):
        raise RequestError('it is no JSON object. Expected {"prompt": "..."} or {"messages": [...]}.')
    unknown = sorted(set(fact) - set(_KEYS))
    if unknown:
        raise RequestError(f"it has unknown keys ({', '.join(unknown)}). Expected some of {', '.join(_KEYS)}.")
    if ("prompt" in fact) == ("messages" in fact):
        raise RequestError('it needs either "prompt" (a text) or "messages" (a list of objects).')
    identity = fact.get("id", number)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise RequestError(f"its id is {identity!r}, expected a text or a whole number.")
    if isinstance(fact.get("quality"), int | float) and not isinstance(fact["quality"], bool):
        fact["quality"] = str(fact["quality"])
    own = replace(sampling, **{name: fact[name] for name in _SAMPLING if name in fact})
    if own.quality:
        parse_quality(own.quality)
    variant = fact.get("variant")
    if variant is not None and not isinstance(variant, str):
        raise RequestError(f"its variant is {variant!r}, expected a text.")
    return BatchRequest(number, identity, _prompt(fact), own, variant)


def _prompt(fact: dict[str, Any]) -> str | list[dict[str, str]]:
    prompt = fact.get("prompt")
    if "prompt" in fact:
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(f"its prompt is {prompt!r}, expected a text of at least one character.")
        return prompt
    messages = fact["messages"]
    expected = 'expected a list of objects such as {"role": "user", "content": "..."}.'
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"its messages are {messages!r}, {expected}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(f"one of its messages is {message!r}, {expected}")
    return messages


def _encoded(store: Store, requests: Sequence[BatchRequest], *, name: str, chat: bool) -> list[list[int]]:
    tokenizer, prompts = load_tokenizer(store), []
    for one in requests:
        try:
            prompts.append(_ids(tokenizer, one.prompt, chat=chat, model=str(store.path)))
        except RequestError as error:
            raise RequestError(f"Line {one.line} of {name}: {error}") from error
    return prompts


def _said(prompt: str | list[dict[str, str]]) -> str:
    """What the user says, by which domains are told: not the template's words."""
    return prompt if isinstance(prompt, str) else text_of_messages(prompt)


def _ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], *, chat: bool, model: str
) -> list[int]:
    if isinstance(prompt, str) and not chat:
        return encode(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return chat_ids(tokenizer, messages, model=model)


def _check_qualities(requests: Sequence[BatchRequest], level_policy: str, name: str) -> None:
    for one in requests:
        if one.sampling.quality:
            try:
                budget_of(level_policy, one.sampling.quality)
            except RequestError as error:
                raise RequestError(f"Line {one.line} of {name}: {error}") from error


def _check_variants(store: Store, requests: Sequence[BatchRequest], name: str) -> None:
    first_with = {one.variant: one.line for one in reversed(requests) if one.variant}
    for variant, line in first_with.items():
        try:
            if variant == AUTO:
                load_router(router_path(store.path), fingerprint=store.manifest.source.fingerprint)
            else:
                open_variant(store, variant)
        except (VariantError, RouteError) as error:
            raise RequestError(f"Line {line} of {name}: {error}") from error


def _check_lengths(requests: Sequence[BatchRequest], prompts: Sequence[list[int]], context: int, name: str) -> None:
    for one, ids in zip(requests, prompts, strict=True):
        if not 0 < len(ids) < context:
            raise RequestError(
                f"Line {one.line} of {name}: the prompt has {len(ids)} tokens and the context holds {context}, of "
                "which at least one is for the answer. Shorten it, or give a longer --context if the model has one."
            )
