"""The journal of an unfinished pack: what it says is on the disk, whatever a crash left behind it."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.store.journal import JOURNAL_NAME, Journal, UnitRecord, read_header

HEADER = {"format": "moestro-store", "fingerprint": "1"}
UNITS = {0: UnitRecord((1,)), 1: UnitRecord((2**64 - 1, 3), (0.5, 1e-06)), 5: UnitRecord((77, 0), (0.0, 1 / 3))}


def _written(folder: Path) -> Path:
    path = folder / JOURNAL_NAME
    path.unlink(missing_ok=True)
    journal = Journal(path, HEADER)
    journal.add({0: UNITS[0], 1: UNITS[1]})
    journal.add({5: UNITS[5]})
    journal.close()
    return path


def _read(path: Path) -> dict[int, UnitRecord]:
    journal = Journal(path, HEADER)
    journal.close()
    return journal.done


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    path = _written(tmp_path)
    assert _read(path) == UNITS
    assert read_header(path) == HEADER
    assert read_header(tmp_path / "none") is None


@given(cut=st.integers(0, 300), tail=st.binary(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_or_garbled_end_is_dropped(cut: int, tail: bytes, tmp_path: Path) -> None:
    path = _written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + tail if cut < len(whole) else tail)
    done = _read(path)
    assert done.items() <= UNITS.items()
    assert cut or done == UNITS
    assert _read(path) == done
    journal = Journal(path, HEADER)
    journal.add({9: UnitRecord((9,))})
    journal.close()
    assert _read(path) == {**done, 9: UnitRecord((9,))}


def test_a_flipped_bit_ends_the_journal(tmp_path: Path) -> None:
    whole = _written(tmp_path).read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / JOURNAL_NAME).write_bytes(damaged)
        assert _read(tmp_path / JOURNAL_NAME).items() < UNITS.items()


def test_another_header_starts_anew(tmp_path: Path) -> None:
    path = _written(tmp_path)
    journal = Journal(path, {**HEADER, "fingerprint": "2"})
    assert journal.done == {}
    journal.close()
    assert _read(path) == {}
