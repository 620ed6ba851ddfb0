"""The compiled decoder refuses parts and steps that would make it read or write outside its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro._native import (
    Decoder,
    KnownExperts,
    KvTarget,
    Layer,
    Norm,
    Rotation,
    Routing,
    Weight,
    make_experts,
    make_matrix,
)
from packed_matrices import Source
from runtime.native.decoders import PICKS as PICKED
from runtime.native.decoders import Model, random_dense, random_expert_set

WIDTH, HEADS, HEADS_KV, DIM, EXPERTS, PICKS, VOCABULARY, BLOCKS, BLOCK, ROWS = 16, 4, 2, 4, 6, 2, 20, 3, 16, 8
CONTEXT = 40


class Parts:
    """A decoder of one layer. Tensors live as long as it does."""

    def __init__(self, **changes: Any) -> None:
        self._tensors: list[torch.Tensor] = []
        self._changes = changes
        self.hidden, self.ids = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, PICKS, dtype=torch.int64)
        angles = torch.ones(CONTEXT, DIM // 2)
        self.decoder = Decoder(
            embedding=self.weight(VOCABULARY, WIDTH),
            norm=self.norm(WIDTH),
            head=self.weight(VOCABULARY, changes.get("head_inputs", WIDTH)),
            rotation=Rotation(self.address(angles), self.address(angles), CONTEXT, DIM // 2),
            residual=self.address(torch.zeros(ROWS, WIDTH)),
            hidden=self.hidden.data_ptr(),
            scratch=self.address(torch.zeros(ROWS, 64)),
            scratch_width=changes.get("scratch_width", 64),
            quantised=0,
            quantised_size=0,
            ids=self.ids.data_ptr(),
            weights=self.address(torch.zeros(ROWS, PICKS)),
            outputs=0,
            picks=changes.get("picks", PICKS),
            rows=ROWS,
            moe_layers=1,
            known_rows=0,
            blocks=BLOCKS,
            block_size=BLOCK,
        )

    def address(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def weight(self, outputs: int, inputs: int) -> Weight:
        data = self.address(torch.linspace(-1, 1, outputs * inputs))
        return Weight(kind=0, data=data, outputs=outputs, inputs=inputs, group=0, bias=0)

    def norm(self, width: int) -> Norm:
        return Norm(self.address(torch.ones(width)), width, 1e-6)

    def layer(self) -> Layer:
        layer = Layer()
        layer.input_norm = layer.post_norm = self.norm(WIDTH)
        layer.heads, layer.heads_kv, layer.head_dim = self._changes.get("heads", HEADS), HEADS_KV, DIM
        layer.q, layer.o = (
            self.weight(self._changes.get("q_outputs", HEADS * DIM), WIDTH),
            self.weight(WIDTH, HEADS * DIM),
        )
        layer.k = layer.v = self.weight(HEADS_KV * DIM, WIDTH)
        if "q_norm" in self._changes:
            layer.q_norm = self.norm(self._changes["q_norm"])
        pool = torch.zeros(BLOCKS, HEADS_KV, BLOCK, DIM)
        self.keys, self.values = pool, pool.clone()
        layer.keys, layer.values = (
            KvTarget(self.address(self.keys), *pool.stride()[:3]),
            KvTarget(self.address(self.values), *pool.stride()[:3]),
        )
        layer.router, layer.routing = self.weight(EXPERTS, WIDTH), Routing.PICK_THEN_SOFTMAX
        return layer

    def begin(self, tokens: list[int], positions: list[int], table: list[list[int]], sequence: int = 0) -> None:
        self.decoder.begin(
            self.address(torch.tensor(tokens)),
            len(tokens),
            self.address(torch.tensor(table, dtype=torch.int32)),
            len(table),
            len(table[0]),
            self.address(torch.full((len(tokens),), sequence, dtype=torch.int32)),
            self.address(torch.tensor(positions, dtype=torch.int32)),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_outputs": 15}, r"q is \[15, 16\], expected \[16, 16\]"),
        ({"q_norm": 8}, "neither a head's nor a row's"),
        ({"heads": 3}, "heads"),
        ({"scratch_width": 31}, "too small for attention"),
        ({"picks": EXPERTS + 1}, "more experts are picked than exist"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(changes: dict[str, int], message: str) -> None:
    parts = Parts(**changes)
    with pytest.raises(ValueError, match=message):
        parts.decoder.add(parts.layer())


def test_parts_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in width"):
        Parts(head_inputs=WIDTH + 1)


@pytest.mark.parametrize(
    ("tokens", "positions", "table", "sequence", "message"),
    [
        ([VOCABULARY], [0], [[0]], 0, "token 20 does not exist"),
        ([-1], [0], [[0]], 0, "token -1 does not exist"),
        ([1], [BLOCK], [[0]], 0, "position 16"),
        ([1], [-1], [[0]], 0, "position -1"),
        ([1], [CONTEXT], [[0, 1, 2]], 0, "position 40 is beyond the context"),
        ([1], [0], [[BLOCKS]], 0, "block 3"),
        ([1], [BLOCK], [[-1, 0]], 0, "block -1"),
        ([1], [0], [[0]], 1, "sequence 1"),
        ([1] * (ROWS + 1), [0] * (ROWS + 1), [[0]], 0, "9 rows do not fit"),
    ],
)
def test_a_step_that_leaves_its_memory_is_refused(
    tokens: list[int], positions: list[int], table: list[list[int]], sequence: int, message: str
) -> None:
    parts = Parts()
    parts.decoder.add(parts.layer())
    with pytest.raises(ValueError, match=message):
        parts.begin(tokens, positions, table, sequence)


def test_a_layer_or_a_row_that_is_not_there_is_refused() -> None:
    parts = Parts()
    parts.decoder.add(parts.layer())
    with pytest.raises(ValueError, match="for fewer MoE layers"):
        parts.decoder.add(parts.layer())
    row, logits = parts.address(torch.tensor([2])), parts.address(torch.zeros(VOCABULARY))
    parts.begin([1, 2], [0, 1], [[0]])
    with pytest.raises(ValueError, match="before the last layer"):
        parts.decoder.logits(row, 1, logits)
    assert parts.decoder.run(0) == 0, "the experts of the only layer are not known"
    assert parts.decoder.run(parts.hidden.data_ptr()) == 1
    with pytest.raises(ValueError, match="row that is not there"):
        parts.decoder.logits(row, 1, logits)


def test_experts_that_do_not_fit_are_refused() -> None:
    up, down = make_matrix(0, 64, WIDTH, 32, [0]), make_matrix(0, WIDTH + 1, 32, 32, [0])
    known = KnownExperts(make_experts(up, down, -1, -1, 1, 0, 0.0, 0.0), 0, 0, [2])
    parts = Parts()
    with pytest.raises(ValueError, match="no such MoE layer"):
        parts.decoder.know(0, known)
    parts.decoder.add(parts.layer())
    with pytest.raises(ValueError, match="another width"):
        parts.decoder.know(0, known)


def test_rows_go_to_their_blocks_and_nowhere_else() -> None:
    parts = Parts()
    parts.decoder.add(parts.layer())
    parts.begin([3, 4], [15, 16], [[2, 0]])
    assert parts.decoder.run(0) == 0
    written = torch.zeros(BLOCKS, BLOCK, dtype=torch.bool)
    written[2, 15] = written[0, 0] = True
    for pool in (parts.keys, parts.values):
        assert torch.equal((pool != 0).any(-1).any(1), written)
    assert parts.ids[:2].unique().numel() == PICKS
    assert (parts.ids[2:] == 0).all()


class TestLookingAhead:
    """Two MoE layers whose experts are known; the router of the second is asked from the first."""

    def test_the_next_router_is_asked_and_what_it_lacks_is_said(self) -> None:
        source = Source(3)
        dense, experts = random_dense(source), random_expert_set(source)
        model = Model(dense, experts)
        rows, ids = 3, torch.full((8, PICKED), -1)
        model.decoder.look_ahead(ids.data_ptr(), PICKED, PICKED)
        whole = model.step([[1, 2, 3]], [None])
        assert model.decoder.seen_rows == 0, "nothing can be lacking"
        base, model.planes_LEP[1][1, 0] = model.planes_LEP[1][1, 0], 0
        assert model.begin([[1, 2, 3]], [None]) == rows
        assert model.decoder.run(0) == 0
        assert model.decoder.seen_rows == rows
        scores_TE = torch.nn.functional.linear(model.hidden[:rows], dense["1.router"], dense["1.router.bias"])
        assert torch.equal(ids[:rows], scores_TE.argsort(dim=1, descending=True))
        assert (ids[rows:] == -1).all()
        model.planes_LEP[1][1, 0] = base
        assert torch.equal(model.finish(rows, 0), whole)

    def test_it_comes_back_only_for_candidates_that_tell(self) -> None:
        model, ids = Model(random_dense(Source(6)), random_expert_set(Source(6))), torch.full((8, PICKED), -1)

        def reached(without: int, telling: int) -> int:
            base, model.planes_LEP[1][without, 0] = int(model.planes_LEP[1][without, 0]), 0
            model.decoder.look_ahead(ids.data_ptr(), PICKED, telling)
            model.begin([[1]], [None])
            number: int = model.decoder.run(0)
            model.planes_LEP[1][without, 0] = base
            return number

        assert reached(0, PICKED) == 0
        likeliest: list[int] = ids[0].tolist()
        for place, expert in enumerate(likeliest):
            for telling in range(PICKED + 1):
                assert reached(expert, telling) == (0 if place < telling else 1), "the next layer needs all of them"

    def test_it_stops_where_it_is_told_to_and_can_go_on(self) -> None:
        source = Source(4)
        model = Model(random_dense(source), random_expert_set(source))
        whole = model.step([[1, 2, 3]], [None])
        model.begin([[1, 2, 3]], [None])
        assert model.decoder.run(0, 1) == 1
        assert model.decoder.seen_rows == 0
        assert torch.equal(model.finish(3, 1), whole)

    def test_candidates_that_do_not_fit_are_refused(self) -> None:
        model = Model(random_dense(Source(5)), random_expert_set(Source(5)))
        for candidates in (3, 5):
            with pytest.raises(ValueError, match="fewer candidates than picks, or more than there are experts"):
                model.decoder.look_ahead(0, candidates, 1)
        with pytest.raises(ValueError, match="more candidates that tell than picks"):
            model.decoder.look_ahead(0, PICKED, PICKED + 1)
