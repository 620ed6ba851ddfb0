"""Traces of a model at work: on prompts that it answers, or on texts that it is made to follow.

Routing of a token depends on the tokens before it and on nothing else, so a text that is run window by window gives the
routing that the model would show if it decoded the text one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.config import RuntimeOptions, SamplingParams
from moestro.engine.engine import Engine
from moestro.engine.evaluate import window_size
from moestro.engine.tokenizer import end_token_ids, load_tokenizer
from moestro.engine.windows import Text, cut_windows
from moestro.errors import RequestError
from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import blocks_for
from moestro.runtime.open import OpenModel, open_model
from moestro.store.reader import Store
from moestro.trace import Recorder, StepRouting, Trace
from moestro.trace.collection import Collections
from moestro.trace.recorder import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class RecordProgress:
    """Requests done and in all."""

    done: int
    total: int


Progress = Callable[[RecordProgress], None]


def record_answers(
    store_path: Path,
    prompts: Sequence[Text],
    *,
    options: RuntimeOptions | None = None,
    sampling: SamplingParams | None = None,
    lookahead: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Answer prompts, `options.max_sequences` at a time, and return what was routed, prompts and answers.

    `lookahead`: so many layers ahead the candidates of the gates are recorded too; the model then runs on the general
    path.

    Raises:
        RequestError: a prompt or a sampling parameter is not valid.
        MoestroError: as `LLM` when opening a store, and when a plane cannot be read.
        UnsupportedModelError: the family's routers are not known to the lookahead.
    """
    store = Store.open(store_path)
    tokenizer = load_tokenizer(store)
    with _recording(store, options or RuntimeOptions(), lookahead) as (opened, experts):
        recorder = opened.runner.recorder = Recorder(experts, collections=_collections(opened), keep=True)
        engine = Engine(
            runner=opened.runner,
            max_sequences=(options or RuntimeOptions()).max_sequences,
            step_rows=opened.plan.step_rows,
            context=opened.plan.context,
            end_ids=end_token_ids(store, opened.skeleton.config),
            vocabulary=int(opened.skeleton.config.vocab_size),
        )
        params, variant = sampling or SamplingParams(), (options or RuntimeOptions()).variant
        sequences = [engine.submit(tokenizer(one.content)["input_ids"], params, variant=variant) for one in prompts]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            recorder.describe(sequence.number, {"dataset": prompt.name})
        done = 0
        while engine.busy:
            for sequence in engine.step():
                if sequence.error is not None:
                    raise sequence.error
                done += sequence.finish_reason is not None
            if progress:
                progress(RecordProgress(done, len(prompts)))
        return recorder.trace()


def record_texts(
    store_path: Path,
    texts: Sequence[Text],
    *,
    options: RuntimeOptions | None = None,
    window: int = 0,
    max_tokens: int = 0,
    prompt_tokens: int = 0,
    lookahead: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Run texts and return what was routed; each window of `cut_windows` is a request.

    Args:
        window: tokens of a window (0: the model's context, at most 512).
        max_tokens: of all windows together (0: all).
        prompt_tokens: the first tokens of a window that are its prompt; the others are recorded as decoded, one by one.
            0: all are the prompt.
        lookahead: as in `record_answers`.

    Raises:
        RequestError: a text, the window, `max_tokens` or `prompt_tokens` is not as expected.
        MoestroError, UnsupportedModelError: as `record_answers`.
    """
    store = Store.open(store_path)
    size = window_size(store, window)
    if not 0 <= prompt_tokens < size:
        raise RequestError(
            f"The prompt of each window is {prompt_tokens} tokens. Expected 0 (all of it) to {size - 1}, since windows "
            f"have {size}."
        )
    windows = cut_windows(load_tokenizer(store), texts, window=size, max_tokens=max_tokens)
    wanted = replace(options or RuntimeOptions(), context=size, max_sequences=1)
    with _recording(store, wanted, lookahead) as (opened, experts):
        recorder = opened.runner.recorder = _RowByRow(experts, collections=_collections(opened), keep=True)
        blocks = opened.runner.kv.allocate(blocks_for(size))
        slot = opened.variants.enter_by_name(wanted.variant)
        for number, one in enumerate(windows):
            ends = [prompt_tokens or size, size]
            for start, end, decode in ((0, ends[0], False), (ends[0], size, True)):
                for first in range(start, end, opened.plan.step_rows):
                    tokens = one.token_ids[first : min(end, first + opened.plan.step_rows)]
                    chunk = Segment(number, tokens, first, blocks, True, decode, variant=slot)
                    opened.runner.forward(PackedBatch([chunk]))
            opened.runner.end_request(number)
            recorder.describe(number, {"dataset": texts[one.text].name})
            if progress:
                progress(RecordProgress(number + 1, len(windows)))
        return recorder.trace()


class _RowByRow(Recorder):
    """Takes the rows that count as decoded one after another, however many of them a forward pass had."""

    def take(self, chunks: Sequence[Chunk], routing: StepRouting) -> None:
        (chunk,) = chunks
        if not chunk.decode:
            super().take(chunks, routing)
            return
        for row, token in enumerate(chunk.token_ids):
            part, ahead = slice(row, row + 1), routing.lookahead_LTPC
            one = StepRouting(
                routing.experts_LTK[:, part],
                routing.weights_LTK[:, part],
                None if ahead is None else ahead[:, part],
            )
            super().take([_Token(chunk.request, (token,))], one)


@dataclass(frozen=True)
class _Token:
    """A decoded token, as a recorder is told of it."""

    request: int
    token_ids: tuple[int]
    decode: bool = True


def _collections(opened: OpenModel) -> Collections | None:
    """Where what is learned of requests goes, if it is."""
    return None if opened.history is None else opened.history.collections


@contextmanager
def _recording(store: Store, options: RuntimeOptions, lookahead: int) -> Iterator[tuple[OpenModel, int]]:
    """The model, opened, and its number of experts."""
    layers = len(store.layers)
    if not 0 <= lookahead < max(layers, 2):
        raise RequestError(f"The lookahead is {lookahead} layers. Expected 0 to {layers - 1}: the model has {layers}.")
    with open_model(store, options, native=not lookahead) as opened:
        if lookahead:
            opened.runner.look_ahead(lookahead)
        yield opened, max(layer.num_experts for layer in store.layers)
