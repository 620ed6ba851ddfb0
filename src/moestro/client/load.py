"""Load on a server: many clients at once, each with its own stream, and the moments at which tokens arrive."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from moestro.client.connection import Connection
from moestro.config import LoadOptions
from moestro.errors import ClientError, MoestroError, RequestError

_CHARACTERS = 4
"""Of a token, about."""


@dataclass
class Sample:
    """One request. Moments in seconds of time.perf_counter; `tokens` as the server counted them."""

    due: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From the moment it was due: a client that had to wait for its turn counts the wait."""
        return self.arrivals[0] - self.due

    @property
    def itl_s(self) -> float:
        """Seconds between tokens, on average over this answer."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)


def run_load(
    connection: Connection, options: LoadOptions, *, progress: Callable[[int], None] | None = None
) -> list[Sample]:
    """Send the requests and follow every answer.

    With a rate, requests are due at random moments (exponential distances); else each of `concurrency` clients sends
    its next one when its last was answered. Prompts are random token ids, or pieces of a text.

    Raises:
        ClientError: the server cannot be reached, or answered no request at all.
        RequestError: the text cannot be read, or is too short.
    """
    model = connection.get("/v1/models")["data"][0]["id"]
    prompts = _prompts(connection, options)
    samples: list[Sample] = []
    lock = threading.Lock()
    start = time.perf_counter()
    todo: SimpleQueue[tuple[float, int]] = SimpleQueue()
    for number, offset in enumerate(_offsets(options)):
        todo.put((offset, number))

    def client() -> None:
        while True:
            try:
                offset, number = todo.get_nowait()
            except Empty:
                return
            due = time.perf_counter()
            if options.rate:
                due = start + offset
                time.sleep(max(0.0, due - time.perf_counter()))
            sample = _ask(connection, _body(model, prompts[number], options, number), due)
            with lock:
                samples.append(sample)
                done = len(samples)
            if progress:
                progress(done)

    # With a rate nobody waits for anybody: as many threads as there are requests.
    count = options.requests if options.rate else min(options.concurrency, options.requests)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if all(sample.error for sample in samples):
        raise ClientError(f"No request was answered. The first one: {samples[0].error}")
    return samples


def summarise(samples: Sequence[Sample], options: LoadOptions) -> dict[str, Any]:
    """What came of it, as JSON. Latencies in milliseconds, rates per second over the whole run.

    `goodput_requests_per_s` counts answers within both limits of the options; without limits it is the request rate.
    """
    whole = [sample for sample in samples if not sample.error]
    wall_s = max(sample.ended for sample in samples) - min(sample.due for sample in samples)
    gaps = [
        later - earlier
        for sample in whole
        for earlier, later in zip(sample.arrivals, sample.arrivals[1:], strict=False)
    ]
    good = [sample for sample in whole if _is_good(sample, options)]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    return {
        "requests": len(samples),
        "answered": len(whole),
        "errors": errors,
        "wall_s": wall_s,
        "prompt_tokens": sum(sample.prompt_tokens for sample in whole),
        "generated_tokens": sum(sample.tokens for sample in whole),
        "requests_per_s": len(whole) / wall_s,
        "generated_tokens_per_s": sum(sample.tokens for sample in whole) / wall_s,
        "total_tokens_per_s": sum(sample.tokens + sample.prompt_tokens for sample in whole) / wall_s,
        "goodput_requests_per_s": len(good) / wall_s,
        "ttft_ms": percentiles([sample.ttft_s for sample in whole]),
        "itl_ms": percentiles(gaps),
        "tpot_ms": percentiles([sample.itl_s for sample in whole if sample.tokens > 1]),
        "e2e_ms": percentiles([sample.ended - sample.due for sample in whole]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, least, most and percentiles (nearest rank) in milliseconds; nothing of nothing."""
    if not seconds:
        return {}
    ordered = sorted(1e3 * one for one in seconds)
    ranks = {f"p{rank}": ordered[max(0, -(-rank * len(ordered) // 100) - 1)] for rank in (50, 90, 95, 99)}
    return {"mean": sum(ordered) / len(ordered), "min": ordered[0], **ranks, "max": ordered[-1]}


def _is_good(sample: Sample, options: LoadOptions) -> bool:
    first = not options.ttft_slo or sample.ttft_s <= options.ttft_slo
    return first and (not options.itl_slo or sample.itl_s <= options.itl_slo)


def _offsets(options: LoadOptions) -> list[float]:
    if not options.rate:
        return [0.0] * options.requests
    chance, moment, offsets = random.Random(options.seed), 0.0, []
    for _ in range(options.requests):
        offsets.append(moment)
        moment += chance.expovariate(options.rate)
    return offsets


def _prompts(connection: Connection, options: LoadOptions) -> Sequence[str | list[int]]:
    """Pieces of a text, or random ids between two that a long text has: all models know those."""
    if options.text:
        return _pieces(Path(options.text), options)
    known = connection.post("/tokenize", {"prompt": "The quick brown fox jumps over the lazy dog, and zebras look on."})
    most = max(known["tokens"])
    chance = random.Random(options.seed)
    return [[chance.randint(1, most) for _ in range(options.prompt_tokens)] for _ in range(options.requests)]


def _pieces(file: Path, options: LoadOptions) -> list[str]:
    """Of equal length, from all over the text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The text {file} cannot be read: {error}. Give a file of UTF-8 text.") from error
    length = _CHARACTERS * options.prompt_tokens
    if len(text) < length:
        raise RequestError(
            f"The text {file} has {len(text)} characters; prompts of {options.prompt_tokens} tokens need {length}."
        )
    chance = random.Random(options.seed)
    starts = [chance.randint(0, len(text) - length) for _ in range(options.requests)]
    return [text[start : start + length] for start in starts]


def _body(model: str, prompt: str | list[int], options: LoadOptions, number: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed + number,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


def _ask(connection: Connection, body: dict[str, Any], due: float) -> Sample:
    sample = Sample(due)
    try:
        for event in connection.stream("/v1/completions", body):
            if event["choices"]:
                sample.arrivals.append(time.perf_counter())
            if event.get("usage"):
                sample.tokens = event["usage"]["completion_tokens"]
                sample.prompt_tokens = event["usage"]["prompt_tokens"]
        if not sample.arrivals:
            sample.error = "The answer was empty."
    except MoestroError as error:
        sample.error = str(error)
    sample.ended = time.perf_counter()
    return sample
