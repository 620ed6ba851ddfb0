"""What a request gives back, and what a model can tell about itself. The fields are part of the published interface."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.domain import Choice
from moestro.engine.routed import RoutedExperts


@dataclass(frozen=True)
class Timings:
    """`load_s` opening the model, `ttft_s` from submission to the first token; rates in tokens per second."""

    load_s: float
    ttft_s: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, in nats: the logarithm of its probability before sampling parameters apply.

    `text` is the token's own (with the replacement character for half a character), `data` its bytes. `top` are the
    likeliest tokens at its place, likeliest first, their own `top` empty.
    """

    id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished request. `finish_reason` is "stop" (by an end-of-text token, a stop string or the end of its guide) or
    "length" (max_tokens reached). `cached_tokens` of the prompt had been computed before. `logprobs` are those of
    its tokens and `routed_experts` the experts, if asked for. `choice` tells who answered and why, where that was left
    to the router of domains."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    timings: Timings
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: Choice | None = None
    routed_experts: RoutedExperts | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one carries the whole completion."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Stats:
    """Counts since the model was opened. Sizes in bytes, times in seconds.

    `stall_s` is time in which nothing could be computed because planes had not arrived: `demand_stall_s` until planes
    came that were asked for when they were needed, `late_prefetch_stall_s` until some came that had been asked for
    ahead, too late; `slowest_read_s` is the longest that the disk took over a request. `compute_s` is time in forward
    passes without it, of which `expert_s` went into experts. Of the experts that layers needed and that were not in
    memory, `prefetch_recall` is the share that had been asked for ahead, in time or late; of those asked for ahead,
    `prefetch_precision` is the share that was needed at once (0 where there were none). Of `bytes_read`,
    `prefetched_bytes` were asked for ahead. `path` says how passes run: "native" (a compiled call per layer) or
    "general" (transformers' own layers, with moestro's attention and experts).
    `policy` keeps experts, by what `predictor` foresees (empty: by what was); `ahead` is what they are read ahead by
    (empty: they are not).
    `variants` are those in memory, with the bytes that each takes beside the planes of its experts.
    `levels_applied` counts the experts of rows that need not be exact, by the level that was chosen for them ("0":
    left out). `domain_tokens` of prompts were run through the base's first layers only to choose a variant, in
    `domain_s`.

    `wall_s` is the time within `generate`, `stream` and others that generate; `time_s` says where it went, and adds up
    to it: "dense" (attention and all matrices but routed experts), "experts", waiting for planes asked for when they
    were needed, while their read was queued ("demand_queue") and while it went on ("demand_read"), the same for those
    asked for ahead, too late ("late_queue", "late_read"), "policy" (observing, choosing levels, victims and what is
    read ahead, the plane cache's own work) and "python" (all between: steps, sampling, text).
    """

    hits: int
    misses: int
    evictions: int
    prefetches: int
    late_prefetches: int
    cancelled_prefetches: int
    wasted_prefetches: int
    wasted_bytes: int
    prefetch_recall: float
    prefetch_precision: float
    bytes_read: int
    prefetched_bytes: int
    stall_s: float
    demand_stall_s: float
    late_prefetch_stall_s: float
    wall_s: float
    time_s: dict[str, float]
    slowest_read_s: float
    compute_s: float
    expert_s: float
    peak_rss_bytes: int
    process_floor_bytes: int
    memory_bytes: int
    model_bytes: int
    dense_bytes: int
    expert_bytes: int
    arena_bytes: int
    kv_bytes: int
    activation_bytes: int
    staging_bytes: int
    variants: dict[str, int]
    level: int
    policy: str
    predictor: str
    ahead: str
    level_policy: str
    levels_applied: dict[str, int]
    path: str
    direct_io: bool
    huge_pages: bool
    domain_tokens: int
    domain_s: float


@dataclass(frozen=True)
class TextScore:
    """One text of an evaluation: scored tokens, their perplexity, and divergence as in `Evaluation`."""

    name: str
    tokens: int
    perplexity: float
    kl_to_raw: float | None


@dataclass(frozen=True)
class Evaluation:
    """A model's quality on texts, over all scored tokens. Losses and divergences in nats per token.

    `kl_to_raw` is the mean Kullback-Leibler divergence of the model's predictions from those of its raw weights, whose
    perplexity is `raw_perplexity`; `same_choice` is the share of tokens for which both find the same token likeliest.
    The three are None without a reference. `bits_per_weight` counts all bytes of the experts' planes up to `level`;
    `tokens_per_s` is the model's own rate, the reference's time left out. `memory_bytes` was for both.
    """

    perplexity: float
    loss: float
    kl_to_raw: float | None
    raw_perplexity: float | None
    same_choice: float | None
    level: int
    bits_per_weight: float
    dense_bits: int
    tokens: int
    windows: int
    window: int
    tokens_per_s: float
    memory_bytes: int
    process_floor_bytes: int
    peak_rss_bytes: int
    texts: tuple[TextScore, ...]
