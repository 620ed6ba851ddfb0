"""Every option a user can set, once: flags, `MOESTRO_*` environment variables and docs derive from here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moestro.client_options import ChatOptions, LoadOptions
from moestro.errors import BudgetError, PackError, RequestError, ServeError, TraceError, VariantError
from moestro.options import check_least, check_types, option
from moestro.route_options import RouteOptions
from moestro.sampling import Guide, SamplingParams

__all__ = [
    "BenchOptions",
    "ChatOptions",
    "Guide",
    "LoadOptions",
    "PackOptions",
    "RouteOptions",
    "RuntimeOptions",
    "SamplingParams",
    "ServeOptions",
    "SimulateOptions",
    "VariantOptions",
    "check_types",
    "option",
]


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How a model is opened. Environment twins: `MOESTRO_MEMORY`, `MOESTRO_CONTEXT`, ..."""

    memory: str = option("50%", "Bytes for dense weights, experts, KV cache and activations: 512MiB, 2GB, 25%.")
    context: int = option(0, "Longest prompt plus answer in tokens (0: the model's own limit, at most 4096).")
    max_sequences: int = option(
        1, "Sequences that may be in flight at once, as far as the KV cache has room for theirs."
    )
    threads: int = option(0, "Compute threads (0: one per available core).")
    level: int = option(0, "Bits of each expert that are read and applied, of the store's levels (0: its exact level).")
    policy: str = option("auto", "Which experts are kept: auto is value where routing has been learned, else lrfu.")
    predictor: str = option(
        "auto", "What foresees experts: auto is learned where it has been, and the next layer's gate for reading ahead."
    )
    prefetch: str = option(
        "auto",
        "Read experts ahead of the router when that pays: auto (but for tokens that are decoded one by one in compiled"
        " code, which then does not come back for it), on or off.",
    )
    learn: str = option(
        "auto", "Remember in the store which experts requests used (on, off); auto: if policy or predictor go by it."
    )
    quality: str = option(
        "exact", "What may be given up for speed: exact, high, balanced, fast, or the nats a token may lose (0.01)."
    )
    level_policy: str = option(
        "auto",
        "How it is given up: ledger, gate, sensitivity, learned, fixed; auto: ledger if errors are known, else gate.",
    )
    order: str = option("auto", "In which order a layer's experts are read: auto (hebf), arrival, hebf or johnson.")
    admit: str = option(
        "auto",
        "Who starts when a place is free: arrival (first come), alike (whose prompt shares most tokens with those that "
        "run, who then share experts); auto: alike where not all experts fit in memory.",
    )
    prefix_cache: bool = option(
        True, "Keep what was computed for the beginnings of requests while the KV cache has room, for others like them."
    )
    lend_kv: bool = option(
        True, "Let experts have what of the KV cache's memory no request needs; they give it back when one does."
    )
    guides: bool = option(
        False,
        "Load what structured output needs: 0.7 KB for each token of the vocabulary, beside the memory given.",
        flag=False,
    )
    variant: str = option(
        "",
        "Variant of the store that answers (empty: the base, auto: one fit for the prompt), as in MODEL:VARIANT.",
    )
    auto_pack: bool = option(True, "Pack a checkpoint into the cache folder when there is no store of it yet.")

    def __post_init__(self) -> None:
        check_types(self, BudgetError)
        if self.prefetch not in ("auto", "on", "off"):
            raise RequestError(f"prefetch is {self.prefetch!r}, expected auto, on or off.")
        if self.admit not in ("auto", "arrival", "alike"):
            raise RequestError(f"admit is {self.admit!r}, expected auto, arrival or alike.")
        if self.learn not in ("auto", "on", "off"):
            raise RequestError(f"learn is {self.learn!r}, expected auto, on or off.")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """How recorded routing is replayed. Environment twins: `MOESTRO_SLOTS`, `MOESTRO_DISK_BW`, ...

    Raises:
        TraceError: a value is not valid, or has no effect beside the others.
    """

    slots: str = option("", "Experts of each layer that memory holds; several, for a sweep: 4,8,16.")
    memory: str = option("", "Bytes that memory holds of experts, instead of --slots: 512MiB, 2GB.")
    store: str = option("", "Store whose planes' sizes, level and learned predictor are used.")
    model_shape: str = option("2880x2880x4", "Without a store: hidden width x expert width x bits of an expert.")
    policy: str = option("value", "Which experts are kept.")
    predictor: str = option("learned", "What foresees the next layer's experts, and what value and others go by.")
    prefetch: str = option("on", "Read experts ahead of the router (on, off).")
    disk_bw: str = option("2.6GB", "Bytes per second that are read from disk.")
    link_bw: str = option("", "Bytes per second from memory to a device, after the disk (empty: no device).")
    compute: float = option(0.001, "Seconds that a layer takes for one token with everything in memory.")
    concurrency: int = option(1, "Requests in flight at once.")
    fit: str = option("half", "Requests to learn from: half (every other one, judged on the rest) or none.")
    timed_tokens: int = option(5000, "Tokens replayed in time, in whole requests of those judged (0: all).")

    def __post_init__(self) -> None:
        check_types(self, TraceError)
        if bool(self.slots) == bool(self.memory):
            raise TraceError("Give either --slots (experts of each layer) or --memory (bytes of experts).")
        if self.slots and not all(one.strip().isdecimal() and int(one) for one in self.slots.split(",")):
            raise TraceError(f"slots is {self.slots!r}, expected whole numbers from 1 on, apart by commas: 4,8,16.")
        check_least(self, TraceError, concurrency=1, timed_tokens=0)
        if not 0 <= self.compute < 1e6:
            raise TraceError(f"compute is {self.compute}, expected seconds of at least 0.")
        for name, chosen, known in (("prefetch", self.prefetch, ("on", "off")), ("fit", self.fit, ("half", "none"))):
            if chosen not in known:
                raise TraceError(f"{name} is {chosen!r}, expected {' or '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `bench` measures. Environment twins: `MOESTRO_PROMPT_TOKENS`, `MOESTRO_REPEAT`, ...

    Raises:
        RequestError: a value is not valid.
    """

    prompt_tokens: int = option(128, "Tokens of each prompt.")
    gen_tokens: int = option(64, "Tokens that are decoded, and measured, after each prompt.")
    repeat: int = option(3, "Runs that are measured; medians are reported.")
    warmup: int = option(1, "Runs before these, which fill the cache.")
    concurrency: int = option(1, "Requests at once.")
    text: str = option("", "UTF-8 file that prompts are cut from (empty: random token ids).")
    cold: bool = option(False, "Open the model anew for each run, with its files evicted from the page cache.")
    replay_routing: str = option("", "Trace whose routing replaces that of the model, which then writes nonsense.")
    seed: int = option(0, "Seed of random prompts and of sampling.")

    def __post_init__(self) -> None:
        check_types(self, RequestError)
        check_least(self, RequestError, prompt_tokens=1, gen_tokens=1, repeat=1, warmup=0, concurrency=1, seed=0)


TOOL_PARSERS = ("hermes", "qwen3_coder", "mistral", "llama3_json", "harmony", "deepseek_v3")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How `serve` listens, and to whom. Environment twins: `MOESTRO_HOST`, `MOESTRO_PORT`, ...

    Raises:
        ServeError: a value is not valid, or leaves the server open to everybody.
    """

    host: str = option("127.0.0.1", "Address to listen on; other than this machine's own needs --api-key-file.")
    port: int = option(8000, "Port to listen on (0: any that is free).")
    model_name: str = option("", "Name of the model in requests (empty: that of its folder or hub id).")
    api_key: str = option(
        "", "Key that requests must bring (others can see it in lists of processes: prefer the file)."
    )
    api_key_file: str = option("", "File with keys that requests may bring, one a line.")
    admin_key: str = option("", "Key of the admin endpoints (empty: there are none).")
    insecure: bool = option(False, "Allow other machines without a key.")
    cors: str = option("", "Origins whose web pages may call the server, apart by commas, or *.")
    max_concurrency: int = option(0, "Requests answered at once (0: as many as pay and fit the memory, at most 16).")
    max_queue: int = option(64, "Requests that may wait; more are refused with status 429.")
    max_request: str = option("4MiB", "Longest body of a request in bytes.")
    structured: bool = option(True, "Offer answers that follow a schema or an expression; a few MB of library.")
    tool_parser: str = option("auto", f"How calls of tools are written: {', '.join(TOOL_PARSERS)}; auto: by template.")
    access_log: bool = option(False, "Write a line of JSON for each answered request to standard error.")
    drain: int = option(30, "Seconds that requests get to end after SIGTERM or Ctrl-C.")

    def __post_init__(self) -> None:
        check_types(self, ServeError)
        if not 0 <= self.port < 2**16:
            raise ServeError(f"port is {self.port}, expected a whole number from 0 to 65535.")
        check_least(self, ServeError, max_concurrency=0, max_queue=0)
        if self.tool_parser not in ("auto", *TOOL_PARSERS):
            raise ServeError(f"tool_parser is {self.tool_parser!r}, expected auto or {', '.join(TOOL_PARSERS)}.")
        if self.drain < 1:
            raise ServeError(f"drain is {self.drain}, expected whole seconds of at least 1.")
        if self.api_key and self.api_key_file:
            raise ServeError("Give either --api-key or --api-key-file: the file may hold several keys.")


LEVELS = (2, 3, 4, 8)
"""Bits that an expert can be quantised to; each level builds on those before it."""

RAW = "raw"
ENCODING_NAMES = ("nested", "signs")
DENSE_BITS = (4, 8, 16)
VARIANT_METHODS = ("me-switch", "bitdelta", "delta-come")
DELTA_BITS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How a store is made of a checkpoint. Environment twins: `MOESTRO_LEVELS`, `MOESTRO_DENSE_BITS`, ...

    Raises:
        PackError: a value is not valid, or has no effect beside the others.
    """

    levels: str = option("2,3,4,8", "Bits that experts can be computed at, or raw to keep all weights as they are.")
    exact_level: int = option(4, "The level of exact results, one of the levels.")
    encoding: str = option("nested", "How experts' bits are stored: nested (one scale) or signs (a scale per plane).")
    dense_bits: int = option(8, "Bits of the linear maps that are not experts: 16 (as they are), 8 or 4 (head: 8).")
    calibration: bool = option(True, "Run the model over a text to find the codes that keep its outputs.")
    calibrate: str = option("", "Text file to calibrate on, documents apart by form feeds (empty: the shipped sample).")
    bit_router: bool = option(False, "Train the net that the level policy learned chooses levels by; takes minutes.")
    dtype: str = option("", "Type of weights that stay unquantised: bfloat16, float16, float32 (empty: their own).")

    def __post_init__(self) -> None:
        check_types(self, PackError)
        if self.is_raw:
            self._check_raw()
        else:
            self._check_quantised()

    @property
    def is_raw(self) -> bool:
        """Whether all weights are kept as they are."""
        return self.levels == RAW

    @property
    def promised_levels(self) -> tuple[int, ...]:
        """The levels, ascending; none where weights stay as they are."""
        return () if self.is_raw else _parse_levels(self.levels)

    def _check_raw(self) -> None:
        fixed = {
            "exact_level": (),
            "encoding": (),
            "dense_bits": (16,),
            "calibration": (),
            "calibrate": (),
            "bit_router": (),
        }
        defaults = {one.name: one.default for one in fields(self)}
        for name, harmless in fixed.items():
            value = getattr(self, name)
            if value != defaults[name] and value not in harmless:
                raise PackError(
                    f"{name} is {value!r}, which has no effect on raw levels: they keep all weights as they are. "
                    f"Leave {name} out, or give levels such as {defaults['levels']}."
                )

    def _check_quantised(self) -> None:
        levels = _parse_levels(self.levels)
        self._check_bit_router(levels)
        if self.exact_level not in levels:
            raise PackError(
                f"exact_level is {self.exact_level}, expected one of the levels {self.levels}: give one of them, or "
                "add it to the levels."
            )
        if self.encoding not in ENCODING_NAMES:
            raise PackError(f"encoding is {self.encoding!r}, expected one of: {', '.join(ENCODING_NAMES)}.")
        if self.dense_bits not in DENSE_BITS:
            raise PackError(f"dense_bits is {self.dense_bits}, expected 16 (as they are), 8 or 4.")
        if self.calibrate and not self.calibration:
            raise PackError(
                f"calibrate is {self.calibrate!r}, which has no effect while calibration is off. Leave one of them out."
            )

    def _check_bit_router(self, levels: tuple[int, ...]) -> None:
        if self.bit_router and not self.calibration:
            raise PackError(
                "bit_router is on, and calibration is off: a bit router is trained on the calibration text. Leave one "
                "of them out."
            )
        if self.bit_router and levels[0] == self.exact_level:
            raise PackError(
                f"bit_router is on, and levels {self.levels} have none below exact_level {self.exact_level}: there is "
                "nothing to choose. Leave bit_router out, or add a lower level."
            )


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """How a fine-tune becomes a variant. Environment twins: `MOESTRO_BITS`, `MOESTRO_SALIENT`, ...

    Raises:
        VariantError: a value is not valid, or has no effect beside the others.
    """

    method: str = option("me-switch", "How: me-switch (codes, kept channels), bitdelta (signs), delta-come (vectors).")
    bits: int = option(2, "Bits of the codes of differences: 1, 2 or 4 (bitdelta: 1).")
    dense_delta_bits: int = option(0, "Bits for matrices that are not experts': 1, 2 or 4 (0: as many as for experts).")
    salient: float = option(0.02, "Share of a matrix's input channels that are kept in 16 bits, at least 2 of them.")
    calibration: bool = option(True, "Run the fine-tune over a text to find the codes that keep its outputs.")
    calibrate: str = option(
        "", "Text file to calibrate on, best of the fine-tune's domain (empty: the shipped sample)."
    )
    distill_steps: int = option(0, "Steps in which the whole model learns the sizes of codes from the fine-tune.")

    def __post_init__(self) -> None:
        check_types(self, VariantError)
        if self.method not in VARIANT_METHODS:
            raise VariantError(f"method is {self.method!r}, expected one of: {', '.join(VARIANT_METHODS)}.")
        if self.bits not in DELTA_BITS:
            raise VariantError(f"bits is {self.bits}, expected 1, 2 or 4.")
        if self.dense_delta_bits not in (0, *DELTA_BITS):
            raise VariantError(f"dense_delta_bits is {self.dense_delta_bits}, expected 1, 2, 4, or 0: as many as bits.")
        if not 0 <= self.salient <= 1:
            raise VariantError(f"salient is {self.salient}, expected a share from 0 to 1, such as 0.02.")
        check_least(self, VariantError, distill_steps=0)
        if self.calibrate and not self.calibration:
            raise VariantError(
                f"calibrate is {self.calibrate!r}, which has no effect while calibration is off. Leave one of them out."
            )
        if self.distill_steps and not self.calibration:
            raise VariantError(
                f"distill_steps is {self.distill_steps}, and calibration is off: steps need a text. Leave one out."
            )
        if self.is_bitdelta and (self.bits_of_dense, self.bits, self.kept_share) != (1, 1, 0.0):
            raise VariantError(
                "method is 'bitdelta', which has 1 bit and keeps no channels: give bits 1 and salient 0."
            )
        if self.is_low_rank and (self.calibrate or self.distill_steps):
            raise VariantError("method is 'delta-come', which uses no text: leave calibrate and distill_steps out.")

    @property
    def is_bitdelta(self) -> bool:
        """Whether all codes are signs, of one size for a matrix."""
        return self.method == "bitdelta"

    @property
    def is_low_rank(self) -> bool:
        """Whether deltas are products of thin matrices, in the bytes of codes of `bits` with a share `salient` kept."""
        return self.method == "delta-come"

    @property
    def calibrates(self) -> bool:
        """Whether codes are found with a text."""
        return self.calibration and self.method == "me-switch"

    @property
    def bits_of_dense(self) -> int:
        """Bits of matrices that are not experts'."""
        return self.dense_delta_bits or self.bits

    @property
    def kept_share(self) -> float:
        """The share of input channels that are kept."""
        return float(self.salient)


def _parse_levels(text: str) -> tuple[int, ...]:
    known = {str(level): level for level in LEVELS}
    found = [known.get(part.strip(), 0) for part in text.split(",")]
    if 0 in found or sorted(set(found)) != found:
        raise PackError(
            f"levels is {text!r}, expected {RAW!r} or some of {', '.join(known)}, ascending and apart by commas: 2,4."
        )
    return tuple(found)
