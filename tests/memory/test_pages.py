from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from moestro.memory.pages import HUGE_PAGE, PAGE, HostBuffer, MappingUsage, mapping_usage, round_up


def usage_of(buffer: HostBuffer) -> MappingUsage:
    return mapping_usage(buffer.address, buffer.address + buffer.nbytes)


def test_round_up() -> None:
    assert [round_up(n, 4096) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


@pytest.mark.parametrize("nbytes", [1, PAGE, HUGE_PAGE, 3 * HUGE_PAGE + 5 * PAGE])
def test_tensor_and_views_are_the_same_aligned_memory(nbytes: int) -> None:
    buffer = HostBuffer(nbytes)
    assert buffer.address % HUGE_PAGE == 0
    assert buffer.tensor.shape == (nbytes,)
    buffer.view(nbytes - 1, 1)[0] = 77
    assert buffer.tensor[-1] == 77
    buffer.tensor[0] = 99
    assert buffer.view(0, 1)[0] == 99
    assert len(buffer.view(0, nbytes)) == nbytes


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, PAGE + 1), (PAGE, 1), (0, -1)])
def test_a_view_beyond_the_buffer_is_a_bug(offset: int, nbytes: int) -> None:
    with pytest.raises(AssertionError):
        HostBuffer(PAGE).view(offset, nbytes)


def test_memory_becomes_resident_only_when_touched() -> None:
    buffer = HostBuffer(64 << 20)
    assert usage_of(buffer).resident < 1 << 20
    buffer.tensor[: 8 << 20] = 1
    assert 8 << 20 <= usage_of(buffer).resident < 16 << 20


def test_populate_makes_all_of_it_resident_and_keeps_the_content() -> None:
    buffer = HostBuffer(8 << 20)
    buffer.tensor[4096] = 5
    buffer.populate()
    assert usage_of(buffer).resident >= 8 << 20
    assert buffer.tensor[4096] == 5
    assert int(buffer.tensor.sum()) == 5


def test_huge_pages_are_reported_as_the_kernel_reports_them() -> None:
    buffer = HostBuffer(8 << 20)
    assert buffer.huge_pages == usage_of(buffer).eligible
    buffer.populate()
    assert buffer.huge_pages == (usage_of(buffer).huge > 4 << 20)


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this machine is set to have no huge pages"
)
def test_huge_pages_are_asked_for() -> None:
    assert HostBuffer(8 << 20).huge_pages
    assert not HostBuffer(HUGE_PAGE - PAGE).huge_pages


def test_the_tail_takes_no_huge_page() -> None:
    buffer = HostBuffer(HUGE_PAGE + PAGE)
    buffer.populate()
    assert HUGE_PAGE + PAGE <= usage_of(buffer).resident < HUGE_PAGE + (512 << 10)


def test_a_system_without_huge_pages_is_served_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NOHUGEPAGE)
    buffer = HostBuffer(4 << 20)
    buffer.populate()
    assert buffer.huge_pages is False


def test_a_kernel_that_knows_no_such_advice_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # the kernel answers EINVAL
    buffer = HostBuffer(4 << 20)
    buffer.tensor.fill_(3)
    assert int(buffer.tensor[-1]) == 3


def test_closed_memory_goes_back_at_once_and_its_views_find_zeros() -> None:
    buffer = HostBuffer(PAGE)
    tensor, view = buffer.tensor, buffer.view(0, 4)
    tensor[:4] = 8
    buffer.close()
    assert bytes(view) == bytes(4)  # the memory has gone back, whoever may still look
    with pytest.raises(AssertionError, match="closed"):
        buffer.view(0, 1)
    with pytest.raises(AssertionError, match="closed"):
        _ = buffer.tensor


SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                3072 kB
AnonHugePages:      2048 kB
THPeligible:           1
VmFlags: rd wr mr mw me ac hg
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Rss:                  16 kB
AnonHugePages:         0 kB
THPeligible:           0
"""


def test_mapping_usage_sums_the_mappings_it_overlaps(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(SMAPS)
    first = MappingUsage(3072 << 10, 2048 << 10, True)
    assert mapping_usage(0x7F0000000000, 0x7F0000400000, smaps) == first
    assert mapping_usage(0x7F0000100000, 0x7F0000500000, smaps) == MappingUsage(3088 << 10, 2048 << 10, True)
    assert mapping_usage(0x7F0000400000, 0x7F0000500000, smaps) == MappingUsage(16 << 10, 0, False)
    assert mapping_usage(0x7E0000000000, 0x7E0000500000, smaps) == MappingUsage()
    assert mapping_usage(0x7F0000000000, 0x7F0000400000, tmp_path / "none") == MappingUsage()
