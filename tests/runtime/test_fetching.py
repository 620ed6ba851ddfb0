"""Passes that fetch what they lack into slots that were lent: the same bits, all slots accounted for, errors said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, random_model
from moestro.config import PackOptions
from moestro.errors import PlaneReadError
from moestro.keys import FIRST_DELTA
from moestro.memory import direct
from moestro.memory.lending import Fetches, Lending
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.prefetch import Slack, SlackMeter
from moestro.runtime.experts import RoutedExperts
from moestro.runtime.fetching import PassFetching
from moestro.runtime.open import OpenModel
from moestro.store.pack import pack
from moestro.store.reader import Store
from opening import Feed, open_store

PROMPT = [5, 17, 3, 99, 42, 8, 120, 64, 31, 77, 12, 150, 9, 9, 23, 58, 101, 6, 44, 71]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fetching")
    random_model(FAMILIES["qwen3_moe"](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=PackOptions(calibration=False)).path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "store"))


def _decode(opened: OpenModel, tokens: int, feed: Feed | None = None) -> list[torch.Tensor]:
    """A prompt, if no request runs, and then tokens one by one."""
    found = []
    if feed is None:
        feed = Feed(opened)
        found += feed.step({0: PROMPT}).values()
    for index in range(tokens):
        found += feed.step({0: [(7 * index) % 150 + 3]}).values()
    return found


def _planes_file(folder: Path) -> Path:
    return Store.open(folder).plane((0, 0, 0)).file


def _check_accounts(opened: OpenModel) -> None:
    """Every slot in use is some plane's, and layers know of nobody else."""
    planes, experts = opened.runner.planes, opened.runner._experts
    held = planes._planes.by_key
    assert planes._arena.used_bytes == sum(plane.slot.nbytes for plane in held.values())
    assert not planes._loading
    lending = planes.lending
    assert lending is not None
    for layer, chains in enumerate(experts.chains):
        known_EP = experts._layers[layer]._known_EP  # type: ignore[attr-defined]
        for expert in range(len(chains)):
            plane = held.get((layer, expert, 0))
            base = opened.arena_buffer.address
            if known_EP[expert, 0]:
                assert plane is not None
                assert tuple(known_EP[expert, : len(plane.inner)] - base) == plane.offsets()
            assert not (plane is not None and lending._unread_LE[layer, expert])


@pytest.mark.parametrize("share", [0.2, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("policy", ["lru", "lrfu", "hobbit"])
def test_no_bit_changes_and_every_slot_is_accounted_for(
    policy: str, share: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    begins = PassFetching.begins
    monkeypatch.setattr(PassFetching, "begins", lambda self, batch: begun.append(begins(self, batch)) or begun[-1])
    with open_store(folder, share=1.0) as opened:
        whole = _decode(opened, 40)
    with open_store(folder, share=share, policy=policy, prefetch="off", learn="off") as opened:
        found = _decode(opened, 40)
        stats = opened.runner.planes.stats
        used = int(np.count_nonzero(opened.runner._experts.counts_LE))
        assert stats.hits + stats.misses >= used
        assert stats.misses > 0
        assert stats.prefetches == 0
        assert opened.transfers.stats.bytes_read == stats.bytes_read
        assert opened.transfers.stats.failed == 0
        assert opened.runner.stats.experts_s > stats.stall_seconds > 0, "waiting is a part of it"
        _check_accounts(opened)
    # What hobbit gives up depends on the layer that needs room, so it has to be asked each time.
    assert begun[-1] == (policy != "hobbit")
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_most_layers_are_computed_without_coming_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    call = RoutedExperts.__call__
    monkeypatch.setattr(RoutedExperts, "__call__", lambda self, *given: asked.append(given[0]) or call(self, *given))
    with open_store(folder, share=0.5, prefetch="off", learn="off") as opened:
        feed = Feed(opened)
        feed.step({0: PROMPT})
        _decode(opened, 40, feed)
        asked.clear()
        before = opened.runner.planes.stats.misses
        _decode(opened, 40, feed)
        missed = opened.runner.planes.stats.misses - before
        assert missed > 20
        assert len(asked) < missed / 4


def test_little_memory_is_as_well_used_as_if_each_slot_were_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass lacks about as many experts as there are slots, it fills some of them twice."""
    twice: list[int] = []
    take_back = Lending.take_back

    def counting(self: Lending) -> Fetches:
        fetches = take_back(self)
        twice.append(len(fetches.fetched) - len({one.place for one in fetches.fetched}))
        return fetches

    monkeypatch.setattr(Lending, "take_back", counting)
    found, missed = {}, {}
    for asks in (True, False):
        with monkeypatch.context() as patch:
            if asks:
                patch.setattr("moestro.runtime.open.lend_slots", lambda *_: None)
            with open_store(folder, share=0.35, policy="lrfu", prefetch="off", learn="off") as opened:
                feed = Feed(opened)
                found[asks] = [*feed.step({0: PROMPT}).values(), *_decode(opened, 150, feed)]
                missed[asks] = opened.runner.planes.stats.misses
                assert opened.transfers.stats.failed == 0
                if not asks:
                    _check_accounts(opened)
    assert sum(twice) > 20
    assert missed[False] < 1.03 * missed[True]
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))


def test_reading_ahead_is_counted_and_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlackMeter, "slack", lambda _self, _read_s, *, reading, **_: Slack(1.0, 2.0 + reading))
    with open_store(folder, share=1.0) as opened:
        whole = _decode(opened, 60)
    with open_store(folder, share=0.5, prefetch="on", learn="off") as opened:
        found = _decode(opened, 60)
        opened.runner.planes.settle()
        stats, foreseen = opened.runner.planes.stats, opened.runner.foreseen
        assert stats.prefetches > 20
        assert stats.prefetched_bytes > 0
        assert 0 < foreseen.useful <= foreseen.made
        assert foreseen.useful <= foreseen.needed
        assert opened.transfers.stats.bytes_read == stats.bytes_read
        _check_accounts(opened)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_a_read_that_fails_is_said_and_forgotten(copied: Path) -> None:
    with open_store(copied, share=1.0) as opened:
        whole = _decode(opened, 30)
    file = _planes_file(copied)
    size, content = file.stat().st_size, file.read_bytes()
    with open_store(copied, share=0.3, prefetch="off", learn="off") as opened:
        feed = Feed(opened)
        feed.step({0: PROMPT})
        _decode(opened, 20, feed)
        os.truncate(file, 4096)
        with pytest.raises(PlaneReadError, match="the file ends"):
            _decode(opened, 40, feed)
        opened.runner.end_request(0)
        _check_accounts(opened)
        with file.open("r+b") as stream:
            stream.write(content)
        assert file.stat().st_size == size
        found = _decode(opened, 30)
        _check_accounts(opened)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_what_is_found_damaged_is_not_answered_with(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "CHECK_EVERY", 2)
    file = _planes_file(copied)
    content = file.read_bytes()
    with open_store(copied, share=0.3, prefetch="off", learn="off") as opened:
        feed = Feed(opened)
        feed.step({0: PROMPT})
        _decode(opened, 20, feed)
        file.write_bytes(bytes(255 - byte for byte in content))
        with pytest.raises(PlaneReadError, match=r"its checksum|the checksum of plane") as caught:
            _decode(opened, 60, feed)
        assert caught.value.requests == {0}
        assert caught.value.key is not None
        _check_accounts(opened)


def test_what_variants_add_to_experts_is_not_lent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = WorthEviction.victims
    monkeypatch.setattr(WorthEviction, "victims", lambda self, *asked: [(0, 0, FIRST_DELTA), *victims(self, *asked)])
    with open_store(folder, share=0.4, learn="off") as opened:
        _decode(opened, 20)
        _check_accounts(opened)


def test_several_rows_and_several_requests_ask_as_before(folder: Path) -> None:
    with open_store(folder, share=1.0, max_sequences=2) as opened:
        feed = Feed(opened)
        whole = [one for index in range(8) for one in feed.step({0: [index + 3], 1: [index + 9]}).values()]
    with open_store(folder, share=0.4, max_sequences=2, learn="off") as opened:
        feed = Feed(opened)
        found = [one for index in range(8) for one in feed.step({0: [index + 3], 1: [index + 9]}).values()]
        _check_accounts(opened)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
