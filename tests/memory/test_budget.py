from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import BudgetError
from moestro.memory.budget import (
    MemoryRequest,
    format_bytes,
    machine_bytes,
    parse_bytes,
    parse_memory,
    peak_resident_bytes,
    resident_bytes,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1073741824", GIB),
        ("512MiB", 512 << 20),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 * GIB // 2),
        (" 512 mib ", 512 << 20),
        ("3kB", 3000),
        ("0.1KiB", 102),
        ("1TiB", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes
    assert parse_memory(text) == MemoryRequest(nbytes=nbytes)


JUNK = ["", "banana", "-1", "-5MiB", "0", "0GB", "1.5", "1e9", "inf", "nan", "2 GB more", "5km", "1,5GB", "GiB", "٣GB"]


@pytest.mark.parametrize("text", JUNK)
def test_junk_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match="512MiB") as refusal:
        parse_bytes(text)
    assert repr(text) in str(refusal.value)
    with pytest.raises(BudgetError, match="25%"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["800M", "2g", "1.5 T", "64K"])
def test_an_ambiguous_unit_is_refused_with_both_readings(text: str) -> None:
    number, unit = text[:-1].strip(), text[-1].upper()
    with pytest.raises(BudgetError, match=f"{number}{unit}iB.*{number}{unit}B"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["101%", "0%", "0.0%", "-3%", "%", "x%", "25%%", "1e1%"])
def test_bad_percentages_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="percentage"):
        parse_memory(text)


def test_a_percentage_has_the_floor_subtracted() -> None:
    assert parse_memory("25%") == MemoryRequest(percent=25.0)
    assert parse_memory(" 12.5 % ").resolve(100, machine=8000) == 900
    assert parse_memory("100%").resolve(0, machine=8000) == 8000
    assert parse_memory("512MiB").resolve(10**12, machine=1) == 512 << 20
    with pytest.raises(BudgetError, match=r"10% of 7\.81 KiB leaves nothing"):
        parse_memory("10%").resolve(800, machine=8000)


def test_a_percentage_is_of_this_machine_by_default() -> None:
    assert parse_memory("50%").resolve(0) == machine_bytes() // 2


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (220 << 20, "220 MiB"),
        (int(12.34 * GIB), "12.3 GiB"),
        (1023 << 20, "1.00 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1024, 999 << 40))
def test_what_is_formatted_can_be_parsed_and_is_close(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= 0.0051 * nbytes + 1


class FakeSystem:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal:       16777216 kB\nMemFree: 1 kB\n")  # 16 GiB

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_cgroups_the_machine_is_its_memory(system: FakeSystem) -> None:
    assert machine_bytes(system.root) == 16 * GIB


def test_without_proc_the_machine_is_what_libc_says(tmp_path: Path) -> None:
    assert 2**26 < machine_bytes(tmp_path) < 2**50


def test_cgroup_v2_limit_of_the_own_group(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/user.slice/job")
    system.write("sys/fs/cgroup/user.slice/job/memory.max", 3 * GIB)
    system.write("sys/fs/cgroup/user.slice/memory.max", "max")
    assert machine_bytes(system.root) == 3 * GIB


def test_cgroup_v2_limit_of_a_group_above_counts(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/a/b/c")
    system.write("sys/fs/cgroup/a/b/c/memory.max", "max")
    system.write("sys/fs/cgroup/a/memory.max", 2 * GIB)
    assert machine_bytes(system.root) == 2 * GIB


def test_cgroup_v2_in_a_container_is_the_root_of_its_mount(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/")
    system.write("sys/fs/cgroup/memory.max", GIB)
    assert machine_bytes(system.root) == GIB


def test_cgroup_v2_beside_v1(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/x")
    system.write("sys/fs/cgroup/unified/x/memory.max", GIB)
    assert machine_bytes(system.root) == GIB


def test_cgroup_v1_limit(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/jobs/one:two\n0::/")
    system.write("sys/fs/cgroup/memory/jobs/one:two/memory.limit_in_bytes", GIB)
    system.write("sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", 5 * GIB)
    assert machine_bytes(system.root) == GIB


def test_cgroup_v1_without_a_limit_is_a_huge_number(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "4:memory:/")
    system.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    assert machine_bytes(system.root) == 16 * GIB


def test_cgroup_v1_in_a_container_that_shows_the_path_of_its_host(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "4:memory:/docker/0123abcd")
    system.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 4 * GIB)
    assert machine_bytes(system.root) == 4 * GIB


def test_other_controllers_do_not_matter(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "4:cpu:/a")
    system.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", GIB)
    assert machine_bytes(system.root) == 16 * GIB


def test_resident_and_peak_of_this_process() -> None:
    before = resident_bytes()
    block = mmap.mmap(-1, 32 << 20)  # fresh memory, whatever the heap has kept of what other tests freed
    block.write(b"x" * (32 << 20))
    assert resident_bytes() - before > 24 << 20
    assert peak_resident_bytes() >= resident_bytes() - (1 << 20)
    del block
    assert peak_resident_bytes() - resident_bytes() > 16 << 20


def test_without_proc_the_peak_comes_from_rusage(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "none") == peak_resident_bytes(tmp_path / "none") > 2**22
