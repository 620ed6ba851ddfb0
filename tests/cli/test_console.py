"""Tables and progress."""

from __future__ import annotations

import pytest

from moestro.cli import console


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("title", [("a", "1", "one"), ("long name", "22"), ("b", "333", "[three]")])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "  a          1    one",
        "  long name  22",
        "  b          333  [three]",
    ]


def test_long_values_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("", [("path", "/" + "x" * 300)])
    assert capsys.readouterr().out.count("\n") == 1


def test_progress_is_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PLAIN_SECONDS", 0.0)
    with console.progress_bar("packing") as report:
        report(0, 4 << 20)
        report(1 << 20, 4 << 20)
        report(4 << 20, 4 << 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("packing: 1.00 MiB of 4.00 MiB, ")
    assert lines[0].endswith(" s left")
    assert lines[1].endswith(" 0 s left")


def test_what_is_being_done_is_said_when_it_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress_bar("packing") as report:
        report(1 << 20, 9 << 20, "dense weights")
        report(1 << 20, 9 << 20, "looking")
        report(1 << 20, 9 << 20, "looking")
        report(3 << 20, 9 << 20, "experts")
        report(5 << 20, 9 << 20, "experts")
    assert capsys.readouterr().err.splitlines() == [
        "packing: dense weights: 1.00 MiB of 9.00 MiB, 102 KiB/s, 80 s left",
        "packing: looking: 1.00 MiB of 9.00 MiB",
        "packing: experts: 3.00 MiB of 9.00 MiB, 205 KiB/s, 30 s left",
        "packing: experts: 5.00 MiB of 9.00 MiB, 205 KiB/s, 20 s left",
    ]


def test_quick_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_bar("packing") as report:
        report(1, 2)
        report(2, 2)
    assert capsys.readouterr().err == ""


def test_a_bar_is_drawn_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with console.progress_bar("packing") as report:
        report(1 << 20, 2 << 20)
    drawn = capsys.readouterr().err
    assert "packing" in drawn
    assert "1.00 MiB of 2.00 MiB" in drawn
