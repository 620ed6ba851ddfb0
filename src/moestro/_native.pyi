"""Compiled CPU kernels (csrc/). Addresses and strides are not checked here: `moestro.kernels.cpu` does that."""

from collections.abc import Sequence
from enum import Enum
from typing import overload

import numpy as np
from numpy.typing import NDArray

def linear(
    x: int,
    x_stride: int,
    weight: int,
    weight_type: int,
    bias: int,
    bias_type: int,
    out: int,
    tokens: int,
    outputs: int,
    inputs: int,
    /,
) -> None: ...
def attention(
    query: int,
    query_row_stride: int,
    query_head_stride: int,
    keys: int,
    key_block_stride: int,
    key_head_stride: int,
    key_position_stride: int,
    values: int,
    value_block_stride: int,
    value_head_stride: int,
    value_position_stride: int,
    block_table: int,
    row_sequence: int,
    row_position: int,
    sinks: int,
    out: int,
    rows: int,
    heads: int,
    heads_kv: int,
    key_dim: int,
    value_dim: int,
    blocks: int,
    block_size: int,
    sequences: int,
    max_blocks: int,
    scale: float,
    window: int,
    softcap: float,
    /,
) -> None:
    """Raises ValueError when a row's sequence, position or block lies outside the table or the pool."""

def combine(outputs: int, weights: int, out: int, tokens: int, picks: int, width: int, /) -> None:
    """Weighted sums over k in ascending order of fp32 outputs [tokens, picks, width]."""

def scale_costs(
    weights: int,
    importance: int,
    scales: int,
    middles: int,
    costs: int,
    steps: list[float],
    priorities: list[float],
    hi: float,
    lo: float,
    tries: int,
    rows: int,
    groups: int,
    group: int,
    /,
) -> None: ...

class CodeRule:
    """What codes stand for: scales are addresses that have to outlive it, as csrc/rounding.h has them."""

    def __init__(
        self,
        scales: list[int],
        groups: int,
        steps: list[float],
        priorities: list[float],
        hi: float,
        lo: float,
        signs: bool,
        /,
    ) -> None: ...

def round_columns(
    rule: CodeRule,
    targets: int,
    target_level_stride: int,
    target_row_stride: int,
    group_of: int,
    pushed: int,
    pushes: int,
    push_stride: int,
    before: int,
    changes: int,
    codes: int,
    nibbles: int,
    rows: int,
    columns: int,
    /,
) -> None: ...
def descend(
    rule: CodeRule,
    group_of: int,
    pushed: int,
    hessian: int,
    aims: int,
    aims_stride: int,
    values: int,
    values_stride: int,
    downhill: int,
    downhill_stride: int,
    codes: int,
    nibbles: int,
    rows: int,
    columns: int,
    /,
) -> None: ...
def set_threads(threads: int) -> None:
    """Size of the process-wide pool, the caller included (1 to 1024, else ValueError). Waits for a running kernel."""

def get_threads() -> int: ...
def available_isas() -> list[str]:
    """Instruction sets that this machine has kernels for, fastest first."""

def set_isa(name: str) -> None:
    """Use one instruction set's kernels in the whole process; ValueError when this machine has none of that name."""

def get_isa() -> str: ...
def linear_scratch_bytes() -> int:
    """Most bytes of scratch that `linear` keeps per thread."""

def attention_scratch_bytes(positions: int, value_dim: int) -> int:
    """Most bytes of scratch that `attention` keeps per thread for rows that attend to up to `positions` positions."""

def scratch_bytes() -> int:
    """Bytes of scratch that the threads hold now: the most that any call has needed."""

def sum_words(address: int, nbytes: int) -> int:
    """Sum, modulo 2^64, of the whole 8-byte words at an address: a plain read on all threads, to compare with."""

class Matrix:
    """Shape, encoding and offsets of a quantised matrix."""

class Experts:
    """The MLP that all experts of a layer share."""

class DeltaShape:
    """Where the parts of a matrix's delta lie."""

class Delta:
    """A matrix's delta at an address: what lies there has to outlive it."""

    def __init__(self, shape: DeltaShape, address: int) -> None: ...

class ExpertDelta:
    """Where the deltas of an expert's matrices lie in their plane."""

class ExpertDeltas:
    """See `ExpertDeltas` of moestro.kernels.specs. Lists are int32 [D], planes int64 [D]; shapes have to outlive it."""

    def __init__(
        self,
        shapes: Sequence[ExpertDelta],
        jobs: NDArray[np.int32],
        firsts: NDArray[np.int32],
        ends: NDArray[np.int32],
        shape: NDArray[np.int32],
        planes: NDArray[np.int64],
        /,
    ) -> None: ...

def make_delta(
    encoding: int, rows: int, columns: int, group: int, salient: int, ids: int, values: int, bias: int, /
) -> DeltaShape:
    """`ids`, `values` and `bias` (negative: none) are offsets. ValueError when the encoding is not flat."""

def make_expert_delta(up: DeltaShape | None, down: DeltaShape | None, up_at: int, down_at: int) -> ExpertDelta: ...
def add_delta(delta: Delta, x: int, x_stride: int, rows: int, out: int, out_stride: int, /) -> None: ...
def add_delta_rows(delta: Delta, ids: int, count: int, out: int, /) -> None:
    """Raises ValueError when an id is not a row."""

def unpack_delta(delta: Delta, out: int, /) -> None: ...
def make_matrix(encoding: int, rows: int, columns: int, group: int, offsets: Sequence[int], /) -> Matrix: ...
def make_experts(
    up: Matrix,
    down: Matrix,
    up_bias: int,
    down_bias: int,
    gate: int,
    activation: int,
    alpha: float,
    limit: float,
    /,
) -> Experts:
    """Biases are offsets in plane 0, negative for none."""

def experts(
    experts: Experts,
    planes: NDArray[np.int64],
    levels: NDArray[np.int32],
    starts: NDArray[np.int32],
    rows: NDArray[np.int32],
    places: NDArray[np.int32],
    hidden: int,
    hidden_stride: int,
    hidden_rows: int,
    out: int,
    out_stride: int,
    out_rows: int,
    deltas: ExpertDeltas,
    /,
) -> None:
    """Raises ValueError when a job's level, planes or rows or a delta are wrong, before anything is computed."""

class Arrivals:
    """Experts whose planes come while others are computed, told by threads that read."""

    def __init__(self) -> None: ...
    def begin(self) -> int:
        """Forget what was told before, and do not hear what is meant for earlier turns; the number of the new turn."""

    def come(self, turn: int, expert: int, planes: Sequence[int]) -> None:
        """An expert is in memory, its planes at these addresses. ValueError when there are more than four."""

    def fail(self) -> None:
        """One will not come."""

    def count(self) -> int:
        """How many have come that nobody has taken."""

class ReadRequest:
    """Reads that a thread has taken together."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def filled(self) -> bool:
        """Whether all of their bytes are where they belong."""

    @property
    def begun(self) -> float:
        """When, in seconds of the system's steady clock; that of `time.perf_counter` on Linux."""

    @property
    def ended(self) -> float:
        """Likewise."""

class ReadStats:
    """Of all requests so far."""

    @property
    def requests(self) -> int:
        """Carried out in the queue, whole."""

    @property
    def busy(self) -> float:
        """Seconds in which at least one was under way."""

    @property
    def slowest(self) -> float:
        """Seconds of the longest."""

    @property
    def others(self) -> int:
        """Reads that are not urgent and that nobody has taken, now."""

class ReadQueue:
    """Reads that wait for a thread: urgent ones before the others, first come first served among equals.

    Those that lie one after another in a file, and are as urgent, share a request of up to `request_bytes`; of those
    that nobody waits for there is one request at a time, of up to `piece_bytes`.
    """

    def __init__(self, request_bytes: int, piece_bytes: int) -> None: ...
    def push(
        self, reads: Sequence[tuple[int, int, int, int, int, bool, tuple[Arrivals, int, int, Sequence[int]] | None]]
    ) -> None:
        """Reads at once: id, descriptor of a file, offset, bytes, address, whether it is urgent; and whom to tell when
        the bytes are there, if anybody: in this turn, an expert comes, with planes at these addresses.

        Neighbours share requests. Ids ascend; what has been pushed before, or after `close`, is passed over.
        """

    def newest(self) -> int:
        """The greatest id that has been pushed; -1: none."""

    def promote(self, id: int) -> None:
        """Make it urgent, behind those that are, unless it has been taken."""

    def remove(self, id: int) -> bool:
        """Take it back unless it has been taken; whether that was so."""

    def start(self) -> None:
        """Have one more thread read, without the interpreter."""

    def tried(self) -> ReadRequest | None:
        """Wait for a request that these threads have tried to carry out; None when it is closed and none is left.

        Where it is not `filled` the caller has to read it, and then to say that it is `done`.
        """

    def next(self) -> ReadRequest | None:
        """Wait for a request that has not begun, for the caller to read, and then to say that it is `done`. None after
        `close`."""

    def done(self, request: ReadRequest) -> None: ...
    def close(self) -> list[int]:
        """End all waiting. Returns the ids of reads that nobody has taken, and which leave."""

    def join(self) -> None:
        """Wait for the threads to end, after `close`."""

    def stats(self) -> ReadStats: ...

class FetchKind(Enum):
    """Why an expert was asked for, and what became of it: lacked by its layer; read ahead and not picked, there when it
    was, or still on its way; taken back before its read began."""

    DEMAND = ...
    AHEAD = ...
    IN_TIME = ...
    LATE = ...
    TAKEN_BACK = ...

class Fetching:
    """Reads what steps of a decoder lack into slots that are lent (csrc/fetching.h).

    `unread`: address of uint8 [layers, experts], not 0 where an expert is nowhere in memory and may be read without
    being checked. Times are seconds of the system's steady clock.
    """

    def __init__(self, queue: ReadQueue, unread: int, layers: int, experts: int) -> None: ...
    def shelve(self, moe_layer: int, file: int, bytes: int, offsets: Sequence[int], inner: Sequence[int]) -> None:
        """Where a layer's experts lie: descriptor (negative: nothing is read), size and offsets of the experts, and
        where planes begin in one. ValueError when there is no such layer, too many experts or planes."""

    def lend(
        self,
        slots: Sequence[tuple[int, int, int, float]],
        idle: Sequence[int] = ...,
        reading: Sequence[int] = ...,
        worths: int = ...,
        rise: float = ...,
    ) -> None:
        """Slots as (address, layer and expert of what lies there, -1: nothing, what that is worth): of those whose
        layers have passed, or that have not been used, that of least worth is filled first.

        What has been read is worth `rise` more than `worths` say, the address of fp64 [layers, experts]; 0: it stays.

        Of a router's candidates for the next layer, that at a rank is read ahead where fewer than `idle[rank]` were
        before it, `reading[rank]` after a layer that reads; empty: routers are not asked. What was fetched before is
        forgotten.
        """

    @property
    def fetched(self) -> list[tuple[int, int, int, FetchKind, float, float, float]]:
        """(layer, expert, number of the slot, kind, when it was asked for, begin and end of its read: 0 where it was
        taken back or has failed), in the order in which they were asked for."""

    @property
    def waits(self) -> list[tuple[float, float, float, bool]]:
        """(begin, end, begin of the read that ended it, whether that was late) of waits."""

    @property
    def visits(self) -> list[tuple[int, float, bool, list[int]]]:
        """(layer, when it routed, whether it waited, what the next router named, if asked) of layers computed."""

class Allowance:
    """What a decoded row may lose, and experts that are applied at the levels in memory within it (csrc/allowance.h).

    `costs`: address of fp64 [layers, experts, levels], nats that a row of one expert loses without the planes of a
    level; `per_byte`: of the same for each byte.
    """

    def __init__(self, costs: int, per_byte: int, layers: int, experts: int, levels: int) -> None: ...
    def hold(self, moe_layer: int, levelled: KnownExperts, planes: int, experts: int, depths: Sequence[int]) -> None:
        """Experts of a layer: `levelled` by level, `planes` the address of int64 [experts, 4], those in memory from the
        first on, and how many each level takes, level 0 in front. ValueError when they do not fit."""

    def begin(self, price: float, left: float, levels: int) -> None:
        """A row may lose `left` nats, at most `price` for each byte that is not read; 0: nothing. Numbers of levels
        chosen here come to `levels`, int64 [layers, picks]."""

    def compute(self, moe_layer: int, hidden: int, ids: int, weights: int, picks: int, outputs: int, sum: int) -> bool:
        """The weighted sum of one row's experts at the levels in memory; False, and nothing is done, where a plane is
        dearer than its reading or more would be lost than is left."""

    @property
    def left(self) -> float: ...

class KnownExperts:
    """The experts of a layer whose planes lie at the addresses `planes`: int64 [count, 4], 0 where not known.

    Number e is applied at the level in place e modulo their number. ValueError when there are no levels.
    """

    def __init__(self, experts: Experts, planes: int, count: int, levels: Sequence[int]) -> None: ...
    def set_deltas(self, slot: int, shape: ExpertDelta | None, planes: int) -> None:
        """What the fine-tune in a slot adds: planes at the addresses `planes`, int64 [count], which outlives this.

        An address is 0 where the plane is not known to be in memory, -1 of an expert that has not changed. None: the
        slot is empty, and rows of it are not known.
        """

    def covers(self, ids: int, rows: int, picks: int, runs: Sequence[tuple[int, int, int]] = ...) -> bool:
        """Whether `run` would compute these."""

    def run(
        self,
        hidden: int,
        ids: int,
        weights: int,
        rows: int,
        picks: int,
        outputs: int,
        sums: int,
        runs: Sequence[tuple[int, int, int]] = ...,
    ) -> bool:
        """Weighted sums of the rows' experts; `outputs` is room for [rows * picks, width]. False: not all are known.

        Rows of `runs`, (slot, first, end) ascending, are those of fine-tunes. ValueError when they are not such rows.
        """

    def run_arriving(
        self,
        hidden: int,
        ids: int,
        weights: int,
        rows: int,
        picks: int,
        outputs: int,
        sums: int,
        arrivals: Arrivals,
    ) -> tuple[list[tuple[float, float, int]], list[tuple[float, float, int, float]]] | None:
        """As `run`, of the base's rows: experts are computed as they come, and `planes` hold where they are.

        Every expert that is picked has to come, those that were known before too; -1 is left out. Returns (begin, end,
        experts) of what was computed at once, and (begin, end, expert that came, begin of its read) of waits, in
        seconds since the call began but for the last, which are of the system's steady clock, 0 where not known; None
        when one will not come. ValueError when an expert does not exist. Signals are handled while nothing comes.
        """

def packed_linear(
    matrix: Matrix, planes: Sequence[int], level: int, x: int, x_stride: int, rows: int, bias: int, out: int, /
) -> None:
    """Raises ValueError when the level is unknown or a plane that it needs is absent; so do the next two."""

def unpack(matrix: Matrix, planes: Sequence[int], level: int, out: int, /) -> None: ...
def packed_rows(matrix: Matrix, planes: Sequence[int], ids: int, count: int, out: int, /) -> None:
    """Raises ValueError also when an id is not a row."""

def activate(experts: Experts, gate: int, up: int, count: int, out: int, /) -> None:
    """The activation of one row of values; reads and writes up to the next multiple of 8 values."""

def experts_shared_bytes(
    rows: int, hidden: int, hidden_group: int, listed: int, width: int, width_group: int, threads: int
) -> int:
    """Most bytes that `experts` shares between threads."""

def experts_scratch_bytes() -> int:
    """Most bytes of scratch that `experts`, `packed_linear` and `unpack` keep per thread."""

def quantised_bytes(rows: int, columns: int, group: int) -> int:
    """Bytes of quantised rows of activations, which `packed_linear` keeps."""

class Weight:
    """A dense matrix [outputs, inputs]; `data` and `bias` (0: none) are addresses.

    `kind` is its place in WEIGHT_DTYPES, 3 for flat8, 4 for flat4, whose activations are quantised in `group`s.
    """

    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, kind: int, data: int, outputs: int, inputs: int, group: int, bias: int) -> None: ...

class Norm:
    """Root-mean-square norm over groups of `width` elements; `weight` is an address."""

    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, weight: int, width: int, eps: float) -> None: ...

class KvTarget:
    """A pool of keys or values of one layer: an address and strides in elements."""

    def __init__(self, data: int, block_stride: int, head_stride: int, position_stride: int) -> None: ...

class Rotation:
    """Addresses of cosines and sines [positions, half], which turn heads of twice that width."""

    def __init__(self, cos: int, sin: int, positions: int, half: int) -> None: ...

class Mlp:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, gate: Weight, up: Weight, down: Weight, scale: Weight) -> None: ...

class Routing(Enum):
    SOFTMAX_THEN_PICK = 0
    SOFTMAX_THEN_PICK_AND_SCALE = 1
    PICK_THEN_SOFTMAX = 2

class Layer:
    """One decoder layer. What is not set is not there."""

    input_norm: Norm
    post_norm: Norm
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_norm: Norm
    k_norm: Norm
    clip: float
    heads: int
    heads_kv: int
    head_dim: int
    keys: KvTarget
    values: KvTarget
    sinks: int
    scale: float
    softcap: float
    window: int
    mlp: Mlp
    router: Weight
    routing: Routing

    def __init__(self) -> None: ...

class VariantLayer:
    """What a fine-tune changes in a layer; what is not set is the base's.

    A matrix is left as it is (None), has a delta, or gives way to an unquantised one of the same shape with its bias.
    `gate`, `up`, `down` and `scale` are those of the dense MLP or shared expert. `sinks` is an address.
    """

    input_norm: Norm
    post_norm: Norm
    q_norm: Norm
    k_norm: Norm
    q: Delta | Weight | None
    k: Delta | Weight | None
    v: Delta | Weight | None
    o: Delta | Weight | None
    gate: Delta | Weight | None
    up: Delta | Weight | None
    down: Delta | Weight | None
    scale: Delta | Weight | None
    router: Delta | Weight | None
    sinks: int

    def __init__(self) -> None: ...

class Variant:
    """A fine-tune's changes of a decoder, with a layer added for each of the decoder's. Knows addresses only."""

    embedding: Delta | Weight | None
    head: Delta | Weight | None
    norm: Norm

    def __init__(self) -> None: ...
    def add(self, layer: VariantLayer) -> None: ...

class Decoder:
    """A decoder on packed rows (csrc/decoder.h). Knows addresses only: what lies there has to outlive it."""

    def __init__(
        self,
        *,
        embedding: Weight,
        norm: Norm,
        head: Weight,
        rotation: Rotation,
        residual: int,
        hidden: int,
        scratch: int,
        scratch_width: int,
        quantised: int,
        quantised_size: int,
        ids: int,
        weights: int,
        outputs: int,
        picks: int,
        rows: int,
        moe_layers: int,
        known_rows: int,
        blocks: int,
        block_size: int,
    ) -> None:
        """Raises ValueError when the parts do not fit each other."""

    def add(self, layer: Layer) -> None:
        """Append a layer; ValueError when it does not fit the model or the workspace."""

    def set_variant(self, slot: int, variant: Variant | None) -> None:
        """Put a fine-tune into a slot (None: empty it), after all layers have been added. Ends the step.

        The variant is copied; what lies at its addresses has to stay until the slot has been emptied or filled anew.
        ValueError when a change does not fit the decoder.
        """

    def begin(
        self,
        token_ids: int,
        rows: int,
        block_table: int,
        sequences: int,
        max_blocks: int,
        row_sequence: int,
        row_position: int,
        runs: Sequence[tuple[int, int, int]] = ...,
        variant_ids: int = 0,
        given_ids: int = 0,
        given_weights: int = 0,
    ) -> None:
        """Begin a step; ValueError when a token, sequence, position, block or fine-tune does not exist.

        Rows of `runs`, (slot, first, end) ascending and not empty, are those of fine-tunes, the others the base's; all
        rows of a sequence are of one. A row's bits depend on its own fine-tune only. `variant_ids`: int64 [rows], by
        which the embeddings that fine-tunes change are looked up, where `token_ids` are places in a table of some rows
        (0: by `token_ids`). `given_ids`, int64 [MoE layers, rows, picks], and `given_weights`, fp32: what layers route,
        whatever their routers say (0: what these say); they exist, and stay until the step ends.
        """

    def know(self, moe_layer: int, experts: KnownExperts) -> None:
        """Compute these experts where their planes are known; ValueError when they do not fit the model."""

    def fetch(self, fetching: Fetching | None) -> None:
        """Have steps of one row of the base read experts that are not known, where slots are lent. ValueError when
        experts of some layer never are. Signals are handled while nothing comes."""

    def spend(self, allowance: Allowance | None) -> None:
        """Have steps of one row of the base compute experts at the levels in memory, where that is allowed."""

    def look_ahead(self, ids: int, candidates: int, telling: int) -> None:
        """Ask the next MoE layer's router early, in steps of few rows: the best `candidates` of each row come to `ids`,
        int64 [known_rows, candidates] (0: ask no longer). `run` then comes back where one of a row's first `telling` is
        not known."""

    @property
    def seen_rows(self) -> int:
        """Rows of those ids that hold what was seen from the layer that `run` has come back at; 0: nothing was."""

    def run(self, delta: int, stop: int = -1) -> int:
        """Go on up to experts that are not known, or those of MoE layer `stop`: the number of their MoE layer, at the
        end the number of those layers.

        `delta`: their weighted sums for the next call (0 at the start of a step).
        """

    def logits(self, rows: int, count: int, out: int, /) -> None:
        """ValueError before the last layer, or of a row that is not there."""

    @property
    def kernel_seconds(self) -> float:
        """Seconds in matrix products and attention so far."""

    @property
    def experts_seconds(self) -> float:
        """Seconds in known experts so far."""

@overload
def lowest(values: NDArray[np.float32], bars: NDArray[np.float32], wanted: int) -> list[int]:
    """Places of so many of the least values + bars, if there are, rising; of equals the first. inf is no value."""

@overload
def lowest(values: NDArray[np.float64], bars: NDArray[np.float64], wanted: int) -> list[int]: ...

class ForesightNets:
    """Nets that foresee routing (csrc/nets.h has the shapes). ValueError for arrays or numbers that do not fit."""

    def __init__(
        self,
        layers: int,
        experts: int,
        decays: Sequence[float],
        gains: Sequence[float],
        offsets: Sequence[int],
        fade: float,
    ) -> None: ...
    def add_role(
        self,
        rows: NDArray[np.uint16],
        recency: NDArray[np.uint16],
        bias: NDArray[np.float32],
        outputs: NDArray[np.uint16],
    ) -> None:
        """One more role, its larger weights as bits of float16; changes the stride."""

    @property
    def stride(self) -> int:
        """Numbers of a layer of a request's state."""

    def follow(
        self,
        state: NDArray[np.float32],
        kept: int,
        layer: int,
        spans: Sequence[tuple[int, int, int]],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> None:
        """Rows went through the layer; spans: (place of a request, its first row, the row behind its last)."""

    def rebuild(self, state: NDArray[np.float32], place: int, role: int) -> None:
        """A role's sums from the own history."""

    def answer(
        self, state: NDArray[np.float32], role: int, layer: int, places: Sequence[int], out: NDArray[np.float32]
    ) -> None:
        """Probabilities that at least one of the requests at these places uses an expert."""
