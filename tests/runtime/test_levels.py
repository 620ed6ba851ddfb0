"""Levels chosen per token and expert: who is exact stays exact, the others read less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration.checkpoints import packed_with_errors
from moestro.calibration import pack
from moestro.config import PackOptions, SamplingParams
from moestro.engine.engine import Engine
from moestro.engine.sequence import Sequence
from moestro.errors import RequestError
from moestro.runtime.open import OpenModel
from opening import Feed, open_store

PROMPTS = [[5, 17, 3, 99, 42, 8, 12], [9, 4, 77, 8, 8, 91, 33], [64, 31, 77, 12, 50]]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose layers' sensitivities are known."""
    return packed_with_errors(request.param, tmp_path_factory.mktemp(request.param))


def _run(opened: OpenModel, qualities: list[str], policy: str) -> list[Sequence]:
    engine = Engine(
        runner=opened.runner,
        max_sequences=3,
        step_rows=64,
        context=256,
        end_ids=frozenset(),
        vocabulary=128,
        level_policy=policy,
    )
    asked = zip(PROMPTS, qualities, strict=False)
    sequences = [engine.submit(prompt, replace(GREEDY, quality=quality)) for prompt, quality in asked]
    while engine.busy:
        engine.step()
    return sequences


def _open(folder: Path, policy: str, share: float = 0.4, *, prefetch: str = "on") -> OpenModel:
    return open_store(folder, share=share, max_sequences=3, level_policy=policy, prefetch=prefetch)


@pytest.mark.parametrize("policy", ["ledger", "gate", "sensitivity"])
def test_an_exact_request_among_others_is_exact(folder: Path, policy: str) -> None:
    with _open(folder, policy, 1.0) as opened:
        wanted = _run(opened, ["exact"] * 3, policy)
    with _open(folder, policy) as opened:
        found = _run(opened, ["fast", "exact", "balanced"], policy)
        applied = opened.runner.levels_applied
    assert found[1].token_ids == wanted[1].token_ids
    assert sum(applied.values()) > 0
    assert applied["4"] < sum(applied.values())


@pytest.mark.parametrize("policy", ["ledger", "gate"])
def test_less_is_read_where_something_may_be_lost(folder: Path, policy: str) -> None:
    read = {}
    for quality in ("exact", "high", "fast"):
        with _open(folder, policy, prefetch="off") as opened:  # what is read ahead differs from run to run
            _run(opened, [quality] * 3, policy)
            read[quality] = opened.runner.planes.stats.bytes_read
    assert read["fast"] < read["high"] <= read["exact"]
    assert read["fast"] < 0.8 * read["exact"]


def test_planes_share_slots_until_a_request_may_lose_something(folder: Path) -> None:
    with _open(folder, "ledger", 1.0) as opened:
        wanted = [one.token_ids for one in _run(opened, ["exact"] * 3, "ledger")]
    with _open(folder, "ledger") as opened:
        planes = opened.runner.planes
        assert planes.joined
        assert [one.token_ids for one in _run(opened, ["exact"] * 3, "ledger")] == wanted
        assert planes.joined
        assert all(key[2] == 0 for key in planes.resident())
        assert _run(opened, ["fast", "exact", "fast"], "ledger")[1].token_ids == wanted[1]
        assert not planes.joined
        assert {key[2] for key in planes.resident()} == {0, 1, 2}
        assert [one.token_ids for one in _run(opened, ["exact"] * 3, "ledger")] == wanted
    with open_store(folder, share=0.4, level_policy="ledger", quality="fast") as opened:
        assert not opened.runner.planes.joined


def test_what_is_in_memory_is_not_given_up(folder: Path) -> None:
    with _open(folder, "ledger", 1.0) as opened:
        wanted = _run(opened, ["exact"] * 3, "ledger")
        found = _run(opened, ["fast"] * 3, "ledger")
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]


def test_rows_have_the_bits_of_their_own_level(folder: Path) -> None:
    """With everything at the lowest level, a step with a choice is a step of a model opened at that level."""
    with open_store(folder, share=1.0, level=2) as opened:
        low = Feed(opened).step({0: PROMPTS[0]})[0]
    with open_store(folder, share=1.0) as opened:
        levels = opened.runner._experts.levels
        assert levels is not None
        levels._policy = _Lowest()
        levels.step = lambda batch: setattr(levels, "_budget_T", torch.ones(batch.rows).numpy())  # type: ignore[method-assign]
        assert torch.equal(Feed(opened).step({0: PROMPTS[0]})[0], low)


class _Lowest:
    def choose(self, ask):  # type: ignore[no-untyped-def]
        return 0 * ask.routing.experts_TK + 1

    def gains(self) -> None:
        return None


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected exact, high"):
        open_store(folder, quality="best")
    with pytest.raises(RequestError, match="There is no level policy"):
        open_store(folder, level_policy="best")
    plain = pack(folder.parent / "checkpoint", tmp_path / "store", options=PackOptions(calibration=False)).path
    with pytest.raises(RequestError, match="without calibration"):
        open_store(plain, level_policy="ledger", quality="fast")
    with open_store(plain, quality="fast") as opened:
        assert opened.level_policy == "gate"
        with pytest.raises(RequestError, match="not a number"):
            _run(opened, ["0.01"], "gate")
