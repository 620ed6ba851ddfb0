"""Counters for Prometheus. Names are those of vLLM where they mean the same, with the prefix `moestro:`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moestro.engine.events import RequestTimings, ServiceSnapshot, Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # type: ignore[no-untyped-call]
PREFIX = "moestro:"

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """What happened to requests, observed as they end, and the service's own counts, taken when they are read.

    Args:
        snapshot: of the service; None while the model is not there.
    """

    def __init__(self, model: str, snapshot: Callable[[], ServiceSnapshot | None]) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._first = self._histogram("time_to_first_token_seconds", "From submission to the first token.")
        self._inter = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From submission to the end.")
        self._queue = self._histogram("request_queue_time_seconds", "From submission to the first step.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the end.")
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self._answer = self._histogram("request_generation_tokens", "Tokens of answers.", _TOKENS)
        self.refusals = 0
        self._registry.register(_ServiceCollector(model, self, snapshot))

    def refused(self) -> None:
        """A request was not taken."""
        self.refusals += 1

    def inter_token(self, seconds: float, tokens: int) -> None:
        """So many tokens came, each so long after the one before it."""
        for _ in range(tokens):
            self._inter.observe(seconds)

    def finished(self, reason: str, usage: Usage, timings: RequestTimings) -> None:
        """An answer has ended."""
        self._queue.observe(timings.queue_s)
        self._whole.observe(timings.total_s)
        self._prompt.observe(usage.prompt_tokens)
        self._answer.observe(usage.completion_tokens)
        if usage.completion_tokens and reason != "error":
            self._first.observe(timings.ttft_s)
            self._prefill.observe(timings.prefill_s)
            self._decode.observe(timings.decode_s)

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str, buckets: Iterable[float] = _SECONDS) -> Histogram:
        labels = ["model_name"]
        metric = Histogram(PREFIX + name, help, labels, registry=self._registry, buckets=tuple(buckets))
        return metric.labels(self._model)


class _ServiceCollector(Collector):
    """The service's own counts at the moment of reading."""

    def __init__(self, model: str, metrics: Metrics, snapshot: Callable[[], ServiceSnapshot | None]) -> None:
        self._model, self._metrics, self._snapshot = model, metrics, snapshot

    def describe(self) -> Iterable[Metric]:
        return []  # or the registry would collect once to learn the names

    def collect(self) -> Iterator[Metric]:
        yield self._counter("requests_refused", "Requests that were not taken.", self._metrics.refusals)
        now = self._snapshot()
        if now is None:
            return
        yield from self._requests(now)
        yield from self._planes(now)
        yield from self._memory(now)

    def _requests(self, now: ServiceSnapshot) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Requests that steps work on.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that no step has taken up.", now.waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Share of KV blocks that requests use, 0 to 1.", now.kv_blocks_used / now.kv_blocks
        )
        yield self._counter("prompt_tokens", "Tokens of prompts of requests that ended.", now.prompt_tokens)
        yield self._counter("cached_prompt_tokens", "Of these, not computed again.", now.cached_tokens)
        yield self._counter("generation_tokens", "Tokens of answers.", now.generated_tokens)
        yield self._labelled("request_success", "Requests that ended.", "finished_reason", now.finished)

    def _planes(self, now: ServiceSnapshot) -> Iterator[Metric]:
        stats = now.stats
        yield self._counter("expert_hits", "Experts of a layer and step that were in memory.", stats.hits)
        yield self._counter("expert_misses", "Experts of a layer and step of which planes were not.", stats.misses)
        yield self._counter("plane_evictions", "Planes that left to make room.", stats.evictions)
        yield self._counter("plane_prefetches", "Planes read ahead of the router.", stats.prefetches)
        yield self._counter(
            "plane_late_prefetches", "Of these, still being read when asked for.", stats.late_prefetches
        )
        yield self._counter("plane_wasted_prefetches", "Of these, never asked for.", stats.wasted_prefetches)
        yield self._counter("plane_wasted_bytes", "Bytes of planes read ahead for nothing.", stats.wasted_bytes)
        read = {"demand": stats.bytes_read - stats.prefetched_bytes, "prefetch": stats.prefetched_bytes}
        yield self._labelled("plane_read_bytes", "Bytes of planes read, by cause.", "cause", read)
        stalls = {"demand": stats.demand_stall_s, "late_prefetch": stats.late_prefetch_stall_s}
        yield self._labelled("stall_seconds", "Time with nothing to compute, by cause.", "cause", stalls)
        yield self._labelled("time_seconds", "Time of steps, by what it went into.", "part", stats.time_s)
        levels = Counter(int(level) for level in now.levels_LE.ravel())
        metric = GaugeMetricFamily(
            f"{PREFIX}experts_resident", "Experts by the bits that are in memory.", labels=["model_name", "bits"]
        )
        for bits, count in sorted(levels.items()):
            metric.add_metric([self._model, str(bits)], count)
        yield metric

    def _memory(self, now: ServiceSnapshot) -> Iterator[Metric]:
        stats = now.stats
        split = {
            "dense": stats.dense_bytes,
            "experts": stats.arena_bytes,
            "kv": stats.kv_bytes,
            "activations": stats.activation_bytes,
            "staging": stats.staging_bytes,
            "variants": sum(stats.variants.values()),
        }
        metric = GaugeMetricFamily(
            f"{PREFIX}memory_bytes", "What the memory given is for.", labels=["model_name", "use"]
        )
        for use, count in split.items():
            metric.add_metric([self._model, use], count)
        yield metric
        yield self._gauge("memory_given_bytes", "The memory given.", stats.memory_bytes)
        yield self._gauge("process_floor_bytes", "What the process took before any weight.", stats.process_floor_bytes)
        yield self._gauge("peak_resident_bytes", "The most that the process held.", stats.peak_rss_bytes)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        metric = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _counter(self, name: str, help: str, value: float) -> Metric:
        metric = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _labelled(self, name: str, help: str, label: str, values: dict[str, float] | dict[str, int]) -> Metric:
        metric = CounterMetricFamily(PREFIX + name, help, labels=["model_name", label])
        for key, value in values.items():
            metric.add_metric([self._model, key], value)
        return metric
