"""However planes are read, and however ill the disk is: the same bits, no deadlock, and a stall that is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from families import FAMILIES, random_model
from moestro.config import PackOptions
from moestro.errors import RequestError
from moestro.memory.direct import preadv
from moestro.memory.disk_profile import DiskProfile, device_of, save_profile
from moestro.memory.transfer import TransferEngine
from moestro.policy.order import LOAD_ORDERS
from moestro.runtime import open as runtime_open
from moestro.store.pack import pack
from opening import Feed, logits_of, open_store

PROMPT = [(7 * index * index + 3 * index + 11) % 157 + 3 for index in range(60)]
NEXT = [9, 4, 77, 15, 120]
STALL_S = 0.3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    random_model(FAMILIES["qwen3_moe"](), dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=PackOptions(calibration=False)).path


@pytest.fixture(scope="module")
def reference(store: Path) -> torch.Tensor:
    with open_store(store, share=1.0, threads=1) as opened:
        return logits_of(opened, PROMPT + NEXT)


def chunked(store: Path, **options: str) -> torch.Tensor:
    """The same logits under little memory, a prompt in two chunks and then token by token."""
    with open_store(store, share=0.25, **options) as opened:
        feed = Feed(opened)
        pieces = [feed.step({0: piece})[0] for piece in (PROMPT[:41], PROMPT[41:], *([token] for token in NEXT))]
        assert opened.runner.planes.stats.misses > 0
    return torch.cat(pieces)


@pytest.mark.parametrize("order", ["auto", *LOAD_ORDERS])
def test_no_order_changes_a_bit(store: Path, reference: torch.Tensor, order: str) -> None:
    assert torch.equal(chunked(store, order=order), reference)


def test_an_order_that_does_not_exist(store: Path) -> None:
    with pytest.raises(RequestError, match=r"no order 'random'.*hebf"):
        open_store(store, order="random")


def test_a_measured_disk_is_read_as_it_likes(
    store: Path, reference: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    profile = DiskProfile(device=device_of(store), threads=5, request_bytes=4096, bytes_per_s=1e9)
    save_profile(profile, tmp_path)
    with open_store(store, share=0.25) as opened:
        assert torch.equal(logits_of(opened, PROMPT + NEXT), reference)
        assert [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")].count("moestro-read") == 5
        stats = opened.transfers.stats
        assert stats.requests == stats.reads  # planes are larger than 4096 bytes: none shares a request


def test_planes_of_an_expert_share_requests(store: Path) -> None:
    with open_store(store, share=0.25, quality="high") as opened:  # so that each has a slot
        logits_of(opened, PROMPT)
        stats = opened.transfers.stats
    assert stats.requests < stats.reads


class Disk:
    """That of models opened from now on: once `ill`, does something before every read, which is told its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._before_read: Callable[[int], None] = lambda _number: None
        monkeypatch.setattr(runtime_open, "TransferEngine", partial(TransferEngine, read_at=self._read_at))

    def ill(self, before_read: Callable[[int], None]) -> None:
        self._count, self._before_read = 0, before_read

    def _read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            self._count += 1
            number = self._count
        self._before_read(number)
        return preadv(descriptor, buffers, offset)


def test_what_was_to_be_read_ahead_is_let_go_of_quietly(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(monkeypatch)
    with open_store(store, share=0.5) as opened:
        disk.ill(lambda _number: time.sleep(0.1))
        planes = opened.runner.planes
        assert planes.prefetch([(0, expert, 0) for expert in range(4)]) == 4
    assert opened.transfers.stats.reads < 4
    assert not [record for record in caplog.records if "prefetch" in record.getMessage()]


@pytest.mark.parametrize("order", ["hebf", "johnson"])
def test_a_disk_that_stalls_in_mid_run(
    store: Path, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    stalled: list[int] = []

    def stall(number: int) -> None:
        if number in (40, 90):
            stalled.append(number)
            time.sleep(STALL_S)

    disk = Disk(monkeypatch)
    with open_store(store, share=0.1, order=order) as opened:
        disk.ill(stall)
        assert torch.equal(logits_of(opened, PROMPT + NEXT, chunk=5), reference)
        stats, read = opened.runner.planes.stats, opened.transfers.stats
    assert stalled == [40, 90]
    assert read.slowest_seconds >= STALL_S
    assert stats.stall_seconds >= STALL_S  # the computation of a tiny layer hides next to nothing of it


def test_a_disk_that_becomes_much_slower_in_mid_run(
    store: Path, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    with open_store(store, share=0.25) as opened:
        feed = Feed(opened)
        first = feed.step({0: PROMPT[:20]})[0]
        quick = opened.runner.planes.stats.stall_seconds
        disk.ill(lambda _: time.sleep(0.005))
        rest = feed.step({0: PROMPT[20:] + NEXT})[0]
        slow = opened.runner.planes.stats.stall_seconds - quick
    assert torch.equal(torch.cat([first, rest]), reference)
    assert slow >= 0.005
