"""The Python API: open a model under a budget of bytes, generate text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from moestro.calibration import pack_apart
from moestro.config import Guide, RuntimeOptions, SamplingParams
from moestro.domain import AUTO, Choice
from moestro.engine.answer import Answer, completion_of, raise_error
from moestro.engine.chooser import Chooser, Route
from moestro.engine.engine import Engine
from moestro.engine.results import Completion, Delta, Stats
from moestro.engine.sampling import Constraint
from moestro.engine.statistics import stats_of
from moestro.engine.timeline import check_timeline_path, write_timeline
from moestro.engine.token_text import TokenTexts
from moestro.engine.tokenizer import chat_ids, encode, end_token_ids, load_tokenizer
from moestro.errors import ClosedError, RequestError
from moestro.hf.skeleton import config_from_dict
from moestro.memory.pages import HostBuffer, PagesWatch
from moestro.policy.choice import check_names
from moestro.policy.levels import parse_quality
from moestro.policy.order import make_load_order
from moestro.runtime.open import OpenModel, open_model
from moestro.runtime.subject import Subject
from moestro.spans import Clock, Part, Timeline
from moestro.store.locate import locate, locate_shapes
from moestro.store.manifest import has_manifest
from moestro.store.pack import PackProgress
from moestro.store.reader import Store
from moestro.store.variant_name import split_variant

if TYPE_CHECKING:
    from moestro.engine.guides import Guides

Prompt = str | List[int]
Request = tuple[Prompt, SamplingParams] | tuple[Prompt, SamplingParams, str | None]
_T = TypeVar("_T", str, SamplingParams)


class LLM:
    """A mixture-of-experts model within a budget of bytes.

    `model` is a store, a checkpoint folder, a Hugging Face id or the name of the built-in model; what is not a store is
    packed once into a cache folder. Options are the fields of `RuntimeOptions`: `LLM("path", memory="512MiB")`.
    `LLM("path:name")` answers with that variant of the store, if a request names no other ("": the base, "auto": the
    one that the store's router of domains finds fit).
    Not thread-safe. `clock` is what `Stats.time_s` and timelines go by, in seconds.

    Raises:
        MoestroError: one of its subclasses, with what to do about it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        options: RuntimeOptions | None = None,
        progress: Callable[[PackProgress], None] | None = None,
        clock: Clock = time.perf_counter,
        **settings: Any,
    ) -> None:
        started = time.perf_counter()
        if isinstance(settings.get("memory"), int):
            settings["memory"] = str(settings["memory"])
        self.options = replace(options or RuntimeOptions(), **settings)
        model, variant = split_variant(str(model))
        self.options = replace(self.options, variant=variant or self.options.variant)
        _check_before_packing(model, self.options)
        store = Store.open(locate(model, auto_pack=self.options.auto_pack, pack=pack_apart, progress=progress))
        self.path = store.path
        # Before the model is opened, so that what it holds counts as the process's floor.
        self.tokenizer = load_tokenizer(store)
        self._token_texts = TokenTexts(self.tokenizer)
        self.chooser = Chooser(store, self.encode)
        config = config_from_dict(store.config_dict)
        end_ids, vocabulary = end_token_ids(store, config), int(config.vocab_size)
        self._guides = _open_guides(self.tokenizer, vocabulary, end_ids) if self.options.guides else None
        self._closed_stats: Stats | None = None
        self._model = open_model(store, self.options, clock=clock, lend_kv=self.options.lend_kv)
        self._pages = PagesWatch(self._model.arena_buffer)
        self._spans = self._model.runner.spans
        self.plan = self._model.plan
        self._engine_of_model = Engine(
            runner=self._model.runner,
            max_sequences=self.options.max_sequences,
            step_rows=self.plan.step_rows,
            context=self.plan.context,
            end_ids=end_ids,
            vocabulary=vocabulary,
            quality=self.options.quality,
            level_policy=self._model.level_policy,
            prefix_cache=self.options.prefix_cache,
            shares=self._model.shares,
            alike=self.options.admit == "alike" or (self.options.admit == "auto" and not self.plan.whole),
        )
        if self.options.variant not in ("", AUTO):
            self._model.variants.open(self.options.variant)
        self._load_s = time.perf_counter() - started

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        sampling: SamplingParams | List[SamplingParams] | None = None,
        *,
        variant: str | List[str] | None = None,
    ) -> list[Completion]:
        """Answer one prompt or several, in their order. Prompts are texts or lists of token ids.

        Several prompts share forward passes, `max_sequences` of them at a time; each gets the tokens that it would get
        alone. `variant` is the one that answers (None: the one that the model was opened with), or one for each prompt.

        Raises:
            VariantError, BudgetError, RouteError: there is no such variant, no room for it, or no router to choose it.
            RequestError: a prompt or a sampling parameter is not valid; nothing has been generated then.
            PlaneReadError: a plane could not be read. Requests that did not need it have been answered, and are lost
                with the error: submit them again.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        batch = [prompts] if single else list(prompts)
        params = _one_each(batch, sampling or SamplingParams(), "sampling parameters")
        names = _one_each(batch, self.options.variant if variant is None else variant, "variants")
        answers: list[Answer] = []
        with self._spans.within(Part.PYTHON):
            try:
                for prompt, one, name in zip(batch, params, names, strict=True):
                    answers.append(self._submit(prompt, one, name))  # type: ignore[arg-type]
                while not all(answer.finished for answer in answers):
                    self._engine.step()
            finally:
                for answer in answers:
                    self._engine.cancel(answer.sequence)
            raise_error(answers)
            return [completion_of(answer, self._load_s) for answer in answers]

    def complete_each(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Answer any number of requests, each as soon as it is done: (its number, its answer). A request is a prompt,
        its parameters and, if it is not the one that the model was opened with, its variant.

        The next requests are taken when fewer wait than can be in flight at once. Closing the iterator cancels those
        that are not answered.

        Raises:
            RequestError: a request is not valid; those before it may have been answered.
            PlaneReadError: a plane could not be read. Who needed it, and who was not answered yet, is lost.
        """
        coming, running = enumerate(requests), dict[int, Answer]()
        try:
            while True:
                with self._spans.within(Part.PYTHON):
                    room = 2 * self.options.max_sequences - len(running)
                    for number, request in islice(coming, room):
                        running[number] = self._submit(*request)
                    if running:
                        self._engine.step()
                    done = [number for number, one in running.items() if one.finished]
                    ended = {number: running.pop(number) for number in done}
                    raise_error([*ended.values()])
                    answers = [(number, completion_of(one, self._load_s)) for number, one in ended.items()]
                if not running and not answers:
                    return
                yield from answers
        finally:
            for answer in running.values():
                self._engine.cancel(answer.sequence)

    @contextmanager
    def timeline(self, path: str | Path) -> Iterator[None]:
        """Write what is done within to `path`, for chrome://tracing or ui.perfetto.dev: `with llm.timeline("t.json"):`.

        At most 200,000 events are kept, in up to 16 MB beside the memory given; what comes after them is left out, and
        that is said. The file is written at the end, after reads under way, also when an error ends it.

        Raises:
            RequestError: it could not be written there.
        """
        check_timeline_path(Path(path))
        planes, spans = self._open.runner.planes, self._spans
        planes.settle()
        recorded = spans.timeline = Timeline(spans.clock())
        try:
            yield
        finally:
            planes.settle()
            spans.timeline = None
            write_timeline(Path(path), recorded)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, variant: str | None = None
    ) -> Iterator[Delta]:
        """Answer one prompt piece by piece. Closing the iterator cancels the request.

        Raises:
            RequestError, VariantError, BudgetError, PlaneReadError: as `generate`.
        """
        with self._spans.within(Part.PYTHON):
            answer = self._submit(prompt, sampling or SamplingParams(), variant)
        try:
            while True:
                with self._spans.within(Part.PYTHON):
                    # Another stream's or batch's steps may have brought tokens, or the end, in the meantime.
                    if not answer.finished and not answer.has_news:
                        self._engine.step()
                    raise_error([answer])
                    news = answer.news()
                if answer.finished:
                    break
                if news.token_ids:
                    yield Delta(news.text, news.token_ids, logprobs=news.logprobs)
            reason, whole = answer.sequence.finish_reason, completion_of(answer, self._load_s)
            yield Delta(news.text, news.token_ids, reason, whole, news.logprobs)
        finally:
            self._engine.cancel(answer.sequence)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a text (ids stay as they are). Raises RequestError when it is not valid Unicode."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        return encode(self.tokenizer, prompt)

    def chat_prompt(
        self,
        messages: List[Mapping[str, Any]],
        *,
        tools: List[Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt, as token ids, that the model's chat template makes of `messages` ({"role": ..., "content": ...}).

        `tools` are functions that may be called, as OpenAI describes them; `settings` are variables of the template.

        Raises:
            RequestError: the model has no chat template, or it does not take these messages.
        """
        return chat_ids(self.tokenizer, messages, model=str(self.path), tools=tools, settings=settings)

    def stats(self) -> Stats:
        """What was placed where, and what happened since the model was opened."""
        if self._closed_stats is not None:
            return self._closed_stats
        return stats_of(self._open, self._spans, huge_pages=self._pages.huge)

    def expert_counts(self) -> np.ndarray:
        """Tokens routed to each expert since the model was opened: int64 [MoE layers, experts]."""
        if self._closed_stats is not None:
            return self._counts_LE
        return self._open.runner.expert_counts.copy()

    def resize(self, memory_bytes: int) -> None:
        """Make the number of bytes another one, while nothing generates: at most what the model was opened with.

        Raises:
            BudgetError: it is above that, or too little for the KV cache and two experts.
        """
        self._engine.resize(memory_bytes)

    def residency(self) -> np.ndarray:
        """Bits of each expert that are in memory or on their way there, 0 for none: int8 [MoE layers, experts].

        Any thread may ask, also while another generates.
        """
        return self._open.runner.held()

    def flush(self) -> None:
        """Forget every expert in memory, every kept prefix and every variant. Nothing may be running."""
        assert not self._engine.busy, "flush() while requests run"
        self._engine.forget()

    def choose(self, prompt: Prompt, *, route: Route | None = None) -> Choice:
        """Who answers a prompt, of the base and the store's variants. `route` is for `Service`.

        Raises:
            RouteError: the store has no router of domains, or its file is damaged.
        """
        text = prompt if isinstance(prompt, str) else str(self.tokenizer.decode(list(prompt), skip_special_tokens=True))
        return self.chooser.choose(text, self.variants(), route or self.route)

    def route(self, prompt_ids: List[int], layers: int) -> np.ndarray:
        """Experts [N, layers, K] that the base picks, as `Engine.route`."""
        while (found := self._engine.route(prompt_ids, layers)) is None:
            self._engine.step()  # requests under way hold all room
        return found

    def variants(self) -> tuple[str, ...]:
        """The names of the store's variants, as they are now. Any thread may ask."""
        return self._open.variants.names()

    def prepare(self, prompt_ids: List[int], sampling: SamplingParams, *, variant: str | None = None) -> Answer:
        """A request, checked and not begun: for `Service`, which runs its engine itself. Any thread may ask.

        Raises:
            RequestError, VariantError, BudgetError: as `generate`.
        """
        name = self.options.variant if variant is None else variant
        sequence = self._engine.prepare(prompt_ids, sampling, self._constraint(sampling.guide), variant=name)
        return Answer(sequence, self.tokenizer, self._token_texts)

    @property
    def engine(self) -> Engine:
        """What runs the requests: for `Service`."""
        return self._engine

    @property
    def buffers(self) -> tuple[HostBuffer, ...]:
        """Where its weights and KV rows are; whether they have gone back tells who closed it."""
        return self._open.buffers

    def close(self) -> None:
        """Stop the transfer threads and give the memory back. The model can only be asked for its stats any more."""
        if self._closed_stats is None:
            self._closed_stats, self._counts_LE = self.stats(), self.expert_counts()
            self._model.close()
            del self._model, self._engine_of_model, self._pages

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> OpenModel:
        self._require_open()
        return self._model

    @property
    def _engine(self) -> Engine:
        self._require_open()
        return self._engine_of_model

    def _require_open(self) -> None:
        if self._closed_stats is not None:
            raise ClosedError("This model is closed. Open it again with LLM(...).")

    def _constraint(self, guide: Guide | None) -> Constraint | None:
        if guide is None:
            return None
        if self._guides is None:
            raise RequestError("guide: the model was opened without what this needs. Open it with guides=True.")
        return self._guides.constraint(guide)

    def _submit(self, prompt: Prompt, sampling: SamplingParams, variant: str | None = None) -> Answer:
        name = self.options.variant if variant is None else variant
        choice = self.choose(prompt) if name == AUTO else None
        answer = self.prepare(self.encode(prompt), sampling, variant=name if choice is None else choice.variant or "")
        answer.choice = choice
        self._engine.add(answer.sequence)
        return answer


def _open_guides(tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_ids: frozenset[int]) -> Guides:
    from moestro.engine.guides import Guides  # 2 MB of library for those who want it

    return Guides(tokenizer, vocabulary=vocabulary, end_ids=end_ids)


def _check_before_packing(model: str, options: RuntimeOptions) -> None:
    """Packing can take long: what can be told from the config and the options is told before it."""
    check_names(options.policy, options.predictor, more=("auto",))
    parse_quality(options.quality)
    make_load_order(options.order)
    if not has_manifest(locate_shapes(model)):
        Subject.open(model).plan(options).require_fit()


def _one_each(prompts: List[Any], given: _T | List[_T], what: str) -> list[_T]:
    """Of each prompt; one that is given alone is that of all."""
    if isinstance(given, str | SamplingParams):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts came with {len(given)} {what}. Expected one each.")
    return list(given)
