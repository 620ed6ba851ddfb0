"""The page of options says what the code says."""

from __future__ import annotations

from pathlib import Path

from moestro.cli.docs import options_page

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run `make docs`"
