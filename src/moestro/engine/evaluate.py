"""A model's quality on texts: perplexity, and how far its predictions are from those of its raw weights.

The model runs as it serves: the engine's own runner, from planes in the arena, within a budget of bytes. The raw model
runs beside it, chunk by chunk, so that logits of a few rows are all that is ever kept.

Shapes: R rows of a chunk, B rows scored at once, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moestro.config import RuntimeOptions
from moestro.engine.reference import is_raw, require_reference
from moestro.engine.results import Evaluation, TextScore
from moestro.engine.tokenizer import load_tokenizer
from moestro.engine.windows import Text, Window, cut_windows
from moestro.errors import BudgetError, RequestError
from moestro.hf.skeleton import config_from_dict
from moestro.memory.budget import format_bytes, peak_resident_bytes
from moestro.policy.levels import EXACT, budget_of
from moestro.runtime.batch import STEP_ROWS, PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, level_of, open_model
from moestro.runtime.plan import Plan, longest_context
from moestro.runtime.subject import Subject
from moestro.store.reader import Store

DEFAULT_WINDOW = 512

_LOGIT_BYTES = 32 << 20
"""Logits of one chunk of a window take no more than this; chunks have no influence on their bits."""

_SCORED_VALUES = 1 << 15
"""Logits that are scored at once: a few arrays of so many 8-byte numbers are covered by the plan's staging."""


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is: windows done and in all, perplexity and seconds so far."""

    done: int
    total: int
    perplexity: float
    seconds: float


def evaluate(
    store_path: Path,
    texts: Sequence[Text],
    *,
    reference_path: Path | None = None,
    options: RuntimeOptions | None = None,
    window: int = 0,
    max_tokens: int = 0,
    one_by_one: bool = False,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> Evaluation:
    """Measure the store at `store_path` on `texts`; against the raw store at `reference_path` if there is one.

    With `options.variant` that variant is measured. Windows are those of `cut_windows`; `window` 0 is
    the model's context, at most 512. `options.memory` is for both models together; `context` and `max_sequences` are
    the evaluation's own. With `one_by_one` tokens are fed one at a time, as decoding does: only speed and levels chosen
    per token can tell.

    Raises:
        RequestError: a text, the window or `max_tokens` is not as expected, or the reference does not fit the store.
        BudgetError: the memory cannot be parsed or is too little for the two models.
        MoestroError: as `LLM` when opening a store, and when a plane cannot be read.
    """
    store = Store.open(store_path)
    level_of(store, (options or RuntimeOptions()).level)
    reference = None if reference_path is None or reference_path == store_path else Store.open(reference_path)
    size = window_size(store, window)
    windows = cut_windows(load_tokenizer(store), texts, window=size, max_tokens=max_tokens)
    if reference is not None:
        _check_reference(store, reference, texts, windows)
    rows = 1 if one_by_one else _chunk_rows(store, size)
    # Windows of a text are no requests.
    wanted = replace(options or RuntimeOptions(), context=size, max_sequences=1, learn="off")
    with ExitStack() as stack:
        opened = []
        for one, its_options in _divide_memory(store, reference, wanted, rows):
            opened.append(stack.enter_context(open_model(one, its_options, logit_rows=rows)))
        budgets = [budget_of(opened[0].level_policy, wanted.quality), *[0.0] * (len(opened) - 1)]
        names = [wanted.variant, *[""] * (len(opened) - 1)]
        feeds = [_Feed(model, rows, budget, name) for model, budget, name in zip(opened, budgets, names, strict=True)]
        scores = _score(feeds, windows, len(texts), progress)
        seconds = opened[0].runner.stats.forward_s
        plans = [model.plan for model in opened]
    return _result(store, reference is None and is_raw(store), texts, windows, scores, seconds, plans)


class _Feed:
    """Runs windows through one model, or a variant of it, chunk by chunk."""

    def __init__(self, opened: OpenModel, rows: int, budget: float, variant: str) -> None:
        self._runner = opened.runner
        self._variant = opened.variants.enter_by_name(variant)
        self._rows, self._budget = rows, budget
        self._blocks = self._runner.kv.allocate(blocks_for(opened.plan.context))

    def logits(self, token_ids: Sequence[int], start: int) -> torch.Tensor:
        """Logits [R, V] of the next tokens of a window, of which `start` have been fed."""
        chunk = Segment(
            0,
            token_ids[start : start + self._rows],
            start,
            self._blocks,
            True,
            decode=self._rows == 1,
            budget=self._budget,
            variant=self._variant,
        )
        return self._runner.forward(PackedBatch([chunk], every_row=True))

    @property
    def rows(self) -> int:
        return self._rows


@dataclass
class _Sums:
    """Sums over the scored tokens of one text; nats."""

    tokens: int = 0
    loss: float = 0.0
    raw_loss: float = 0.0
    divergence: float = 0.0
    same_choice: int = 0

    def add(self, logits_RV: Sequence[torch.Tensor], next_ids: Sequence[int]) -> None:
        """Count what each row predicted; `logits_RV` are the model's and, if it is measured against one, the raw's."""
        block = max(1, _SCORED_VALUES // logits_RV[0].shape[1])
        self.tokens += len(next_ids)
        for start in range(0, len(next_ids), block):
            ids = torch.tensor(next_ids[start : start + block]).unsqueeze(1)
            log_p_BV, *raw = (torch.log_softmax(one[start : start + block].double(), -1) for one in logits_RV)
            self.loss -= float(log_p_BV.gather(1, ids).sum())
            for raw_BV in raw:
                self.raw_loss -= float(raw_BV.gather(1, ids).sum())
                self.divergence += float((raw_BV.exp() * (raw_BV - log_p_BV)).sum())
                self.same_choice += int((raw_BV.argmax(-1) == log_p_BV.argmax(-1)).sum())

    def include(self, other: _Sums) -> None:
        """Add the sums of another text."""
        self.tokens += other.tokens
        self.loss += other.loss
        self.raw_loss += other.raw_loss
        self.divergence += other.divergence
        self.same_choice += other.same_choice


def _score(
    feeds: Sequence[_Feed],
    windows: Sequence[Window],
    texts: int,
    progress: Callable[[EvaluationProgress], None] | None,
) -> list[_Sums]:
    sums = [_Sums() for _ in range(texts)]
    started = time.perf_counter()
    for done, one in enumerate(windows, start=1):
        for start in range(0, len(one.token_ids) - 1, feeds[0].rows):
            _score_chunk(feeds, one, start, sums[one.text])
        if progress:
            so_far = sum(text.loss for text in sums) / sum(text.tokens for text in sums)
            progress(EvaluationProgress(done, len(windows), math.exp(so_far), time.perf_counter() - started))
    return sums


def _score_chunk(feeds: Sequence[_Feed], window: Window, start: int, sums: _Sums) -> None:
    """Run and score the rows from `start` on; the logits are gone when it returns, before the next are made."""
    fed = window.token_ids[:-1]
    logits = [feed.logits(fed, start) for feed in feeds]
    end = start + len(logits[0])
    first = max(start, window.first_scored - 1)
    if first < end:
        sums.add([rows[first - start :] for rows in logits], window.token_ids[first + 1 : end + 1])


def window_size(store: Store, asked: int) -> int:
    """Tokens of a window: what was asked for, or 512 or the model's context. Raises RequestError."""
    longest = longest_context(config_from_dict(store.config_dict))
    if asked and not 2 <= asked <= longest:
        raise RequestError(
            f"The window is {asked} tokens. Expected 2 to {longest}, which is what the model takes (0: by itself)."
        )
    return asked or min(longest, DEFAULT_WINDOW)


def _chunk_rows(store: Store, window: int) -> int:
    vocabulary = int(config_from_dict(store.config_dict).vocab_size)
    return max(1, min(window - 1, STEP_ROWS, _LOGIT_BYTES // (4 * vocabulary)))


def _check_reference(store: Store, reference: Store, texts: Sequence[Text], windows: Sequence[Window]) -> None:
    require_reference(store, reference)
    size = len(windows[0].token_ids)
    whole, same = (cut_windows(load_tokenizer(one), texts, window=size) for one in (store, reference))
    if whole != same:
        raise RequestError(
            f"The reference {reference.path} has a tokenizer that makes other tokens of the texts than that of "
            f"{store.path}. Give the raw weights of the same model."
        )


def _divide_memory(
    store: Store, reference: Store | None, options: RuntimeOptions, rows: int
) -> list[tuple[Store, RuntimeOptions]]:
    """Both stores with their parts of the memory: the least each needs, the rest as their experts can use it."""
    if reference is None:
        return [(store, options)]
    asked = ((store, options), (reference, replace(options, level=0, quality=EXACT, level_policy="auto")))
    plans = [Subject.of_store(one).plan(its_options, logit_rows=rows) for one, its_options in asked]
    total, least = plans[0].memory_bytes, [plan.least_bytes for plan in plans]
    if total < sum(least):
        raise BudgetError(
            f"{format_bytes(total)} is too little for this model and its raw reference side by side: "
            f"{format_bytes(sum(least))} ({sum(least)} bytes) is the least that works. Give more memory, or measure "
            "without a reference."
        )
    more = [max(0, plan.bytes_for_experts(1.0) - plan.least_bytes) for plan in plans]
    part = min(1.0, (total - sum(least)) / max(1, sum(more)))
    for_reference = least[1] + int(part * more[1])
    given = (total - for_reference, for_reference)
    return [(one, replace(mine, memory=str(memory))) for (one, mine), memory in zip(asked, given, strict=True)]


def _result(
    store: Store,
    is_reference: bool,
    texts: Sequence[Text],
    windows: Sequence[Window],
    scores: Sequence[_Sums],
    seconds: float,
    plans: Sequence[Plan],
) -> Evaluation:
    whole = _Sums()
    for text in scores:
        whole.include(text)
    if is_reference:  # the raw model beside itself: nothing to compute
        for text in (whole, *scores):
            text.raw_loss, text.same_choice = text.loss, text.tokens
    compared = is_reference or len(plans) > 1
    subject = Subject.of_store(store)
    return Evaluation(
        perplexity=math.exp(whole.loss / whole.tokens),
        loss=whole.loss / whole.tokens,
        kl_to_raw=whole.divergence / whole.tokens if compared else None,
        raw_perplexity=math.exp(whole.raw_loss / whole.tokens) if compared else None,
        same_choice=whole.same_choice / whole.tokens if compared else None,
        level=plans[0].level,
        bits_per_weight=subject.bits_per_weight(plans[0].level),
        dense_bits=subject.dense_bits,
        tokens=whole.tokens,
        windows=len(windows),
        window=len(windows[0].token_ids),
        tokens_per_s=sum(len(one.token_ids) - 1 for one in windows) / seconds,
        memory_bytes=sum(plan.memory_bytes for plan in plans),
        process_floor_bytes=plans[0].floor_bytes,
        peak_rss_bytes=peak_resident_bytes(),
        texts=tuple(
            TextScore(
                name=text.name,
                tokens=sums.tokens,
                perplexity=math.exp(sums.loss / sums.tokens),
                kl_to_raw=sums.divergence / sums.tokens if compared else None,
            )
            for text, sums in zip(texts, scores, strict=True)
        ),
    )
