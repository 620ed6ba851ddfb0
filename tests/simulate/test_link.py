"""The virtual link: when reads end, in which order, and what waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moestro.memory.tickets import Read, Ticket
from moestro.simulate.link import VirtualLink


def read(nbytes: int) -> Read:
    return Read(Path(), 0, nbytes, memoryview(b""), (), "a read")


class Log:
    """When which read arrived."""

    def __init__(self, link: VirtualLink) -> None:
        self.link = link
        self.arrived: list[tuple[str, float]] = []

    def submit(self, name: str, nbytes: int, *, urgent: bool = True) -> Ticket:
        def done(_ticket: Ticket) -> None:
            self.arrived.append((name, self.link.clock()))

        return self.link.submit(read(nbytes), urgent=urgent, on_done=done)


def test_reads_follow_each_other_and_take_latency_and_bytes() -> None:
    log = Log(VirtualLink(100.0, 0.5))
    log.submit("a", 100)
    log.submit("b", 200)
    log.link.pass_time(1.4)
    assert log.arrived == []
    log.link.pass_time(2.6)
    assert log.arrived == [("a", 1.5), ("b", 4.0)]
    assert log.link.clock() == 4.0


def test_urgent_reads_overtake_but_do_not_interrupt() -> None:
    log = Log(VirtualLink(100.0))
    log.submit("ahead", 100, urgent=False)
    second = log.submit("second", 100, urgent=False)
    log.submit("third", 100, urgent=False)
    log.submit("now", 100)
    log.link.promote(second)
    log.link.pass_time(10)
    assert [name for name, _ in log.arrived] == ["ahead", "now", "second", "third"]
    assert (log.link.carried.demand, log.link.carried.prefetch) == (100, 300)


def test_only_what_has_not_begun_can_be_cancelled() -> None:
    log = Log(VirtualLink(100.0))
    first, second = log.submit("first", 100), log.submit("second", 100)
    assert not log.link.cancel(first)
    assert log.link.cancel(second)
    log.link.pass_time(10)
    assert log.arrived == [("first", 1.0)]


def test_waiting_lets_time_pass_until_something_arrives() -> None:
    log = Log(VirtualLink(100.0))
    log.submit("a", 300)
    changed = threading.Condition()
    with changed:
        log.link.wait(changed)
    assert log.link.clock() == 3.0
    assert log.arrived == [("a", 3.0)]


@pytest.mark.parametrize(("onward", "arrivals"), [(50.0, [3.0, 5.0]), (200.0, [1.5, 2.5])])
def test_the_way_to_a_device_is_a_second_stage(onward: float, arrivals: list[float]) -> None:
    log = Log(VirtualLink(100.0, 0.0, onward))
    log.submit("a", 100)
    log.submit("b", 100)
    log.link.pass_time(10)
    assert [at for _, at in log.arrived] == arrivals
    assert log.link.seconds_for(100) == max(1.0, 100 / onward)
