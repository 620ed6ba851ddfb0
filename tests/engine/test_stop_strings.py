"""Stop strings: nothing of them is ever let through, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.engine.stop_strings import StopStrings


def _through(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    filter_ = StopStrings(stops)
    out, begin = "", 0
    for end in [*sorted(cuts), len(text)]:
        out += filter_.push(text[begin:end])
        begin = max(begin, end)
        assert not any(stop in out for stop in stops)
    return out + filter_.finish(), filter_.found


def _expected(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_the_answer_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    assert _through(text, stops, [min(cut, len(text)) for cut in cuts]) == _expected(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("Hello.\n") == "Hello."
    assert stops.push("\nUse") == ""
    assert stops.push(" it") == "\n\nUse it"
    assert (stops.push("\n\nUser: "), stops.push("more"), stops.finish()) == ("", "", "")
    assert stops.found
