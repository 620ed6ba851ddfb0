"""Files of requests: what is checked before anything runs, the order of answers, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tiny import tiny_checkpoint
from moestro import LLM, RuntimeOptions, SamplingParams
from moestro.engine.answer import Answer, completion_of
from moestro.engine.batch_file import BatchReport, Done, answer_file, by_length, read_requests
from moestro.engine.results import Completion
from moestro.engine.throughput import options_for
from moestro.errors import BudgetError, RequestError
from moestro.runtime.subject import Subject
from moestro.store.locate import locate_source
from moestro.store.reader import Store
from opening import plan_of
from packing import pack_raw

SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)
LINES = [
    {"prompt": "def main(argv):\n    "},
    {"prompt": "The dictionary " * 8, "id": "long", "max_tokens": 12},
    {"messages": [{"role": "user", "content": "Hello"}], "id": 77},
    {"prompt": "1", "temperature": 0.9, "seed": 4, "top_p": 0.9, "top_k": 50},
    {"prompt": "Der Befehl", "quality": "exact", "max_tokens": 1},
    {"prompt": "\u30de\u30cb\u30e5\u30a2\u30eb", "quality": "fast", "ignore_eos": False},
]
TEXT = "\n".join(json.dumps(line) for line in LINES) + "\n\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("batch")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    shutil.copy(locate_source("tiny-qwen3moe-28m") / "chat_template.jinja", checkpoint)
    return pack_raw(checkpoint, folder / "store")


def _options(store: Store, share: float = 0.3, sequences: int = 3) -> RuntimeOptions:
    options = RuntimeOptions(context=128, max_sequences=sequences)
    return RuntimeOptions(memory=str(plan_of(store.path, options).bytes_for_experts(share)))


def _answer(store: Store, out: Path, lines: list[Any] = LINES, **options: Any) -> BatchReport:
    requests = read_requests("\n".join(map(json.dumps, lines)), "many.jsonl", SAMPLING)
    return answer_file(store, _options(store), requests, out, name="many.jsonl", **options)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_answers_are_in_order_and_those_that_each_request_gets_alone(store: Store, tmp_path: Path) -> None:
    seen: list[Done] = []
    report = _answer(store, tmp_path / "out", progress=seen.append)
    answers = _lines(tmp_path / "out")
    assert [list(answer) for answer in answers] == [["id", "text", "token_ids", "finish_reason"]] * len(LINES)
    assert [answer["id"] for answer in answers] == [1, "long", 77, 4, 5, 6]
    with LLM(store.path, options=RuntimeOptions(memory="1GiB", context=128)) as llm:
        for request, answer in zip(read_requests(TEXT, "many.jsonl", SAMPLING), answers, strict=True):
            prompt = llm.chat_prompt(request.prompt) if isinstance(request.prompt, list) else request.prompt
            alone = llm.generate(prompt, request.sampling)[0]
            if request.sampling.quality != "fast":
                assert alone.token_ids == answer["token_ids"]
                assert (alone.text, alone.finish_reason) == (answer["text"], answer["finish_reason"])
    assert report.tokens == sum(len(answer["token_ids"]) for answer in answers)
    assert (report.requests, report.answered_before) == (6, 0)
    assert report.max_sequences > 1
    assert seen[-1] == Done(6, 6)


def test_chat_wraps_prompts(store: Store, tmp_path: Path) -> None:
    _answer(store, tmp_path / "plain", [{"messages": [{"role": "user", "content": "Hello"}]}])
    _answer(store, tmp_path / "chat", [{"prompt": "Hello"}], chat=True)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "chat").read_bytes()


@pytest.mark.parametrize(("kept", "cut"), [(0, 9), (3, 0), (7, 30)])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    store: Store, tmp_path: Path, kept: int, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    exact = [line for line in LINES if "quality" not in line] * 2
    _answer(store, tmp_path / "whole", exact)
    whole = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join(whole[:kept]) + whole[kept][:cut])
    report = _answer(store, tmp_path / "out", exact)
    assert (tmp_path / "out").read_bytes() == b"".join(whole)
    assert report.answered_before == kept
    assert report.requests == len(exact)
    assert ("had been cut" in caplog.text) == (cut > 0)


def test_what_is_all_answered_costs_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _answer(store, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    monkeypatch.delattr("moestro.engine.batch_file.LLM")
    assert _answer(store, tmp_path / "out").answered_before == len(LINES)
    assert (tmp_path / "out").read_bytes() == before


def test_an_interruption_leaves_whole_lines_in_order(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(store, tmp_path / "whole", LINES[:4] * 4)
    count = 0

    def interrupted(answer: Answer, load_s: float) -> Completion:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return completion_of(answer, load_s)

    with monkeypatch.context() as patch:
        patch.setattr("moestro.engine.llm.completion_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _answer(store, tmp_path / "out", LINES[:4] * 4)
    whole, part = (tmp_path / "whole").read_bytes(), (tmp_path / "out").read_bytes()
    assert whole.startswith(part)
    assert part == b"" or part.endswith(b"\n")
    _answer(store, tmp_path / "out", LINES[:4] * 4)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", 'either "prompt"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt"'),
        ('{"prompt": ""}', "at least one character"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"messages": []}', "messages are"),
        ('{"messages": [{"role": "user"}]}', "one of its messages"),
        ('{"prompt": "a", "temprature": 1}', "temprature"),
        ('{"prompt": "a", "id": [1]}', "id is [1]"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": "a", "max_tokens": "6"}', "max_tokens is '6'"),
        ('{"prompt": "a", "quality": "best"}', "'best'"),
        ('{"prompt": "a", "quality": true}', "quality is True"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, says: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read_requests(f'{{"prompt": "a"}}\n\n{line}\n', "many.jsonl", SAMPLING)
    assert str(refusal.value).startswith("Line 3 of many.jsonl: ")
    assert says in str(refusal.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_requests_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="holds no request"):
        read_requests(text, "many.jsonl", SAMPLING)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "word " * 800}, "the context holds 512"),
        ({"prompt": "a", "quality": 0.01}, "'gate'"),
        ({"prompt": "a\ud800"}, "not valid Unicode"),
    ],
)
def test_a_prompt_that_does_not_do_is_named_before_anything_runs(
    store: Store, tmp_path: Path, line: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=r"Line 2 of many\.jsonl") as refusal:
        _answer(store, tmp_path / "out", [LINES[0], line])
    assert says in str(refusal.value)
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("my notes\n", "Line 1 of"),
        ('{"id": 2, "text": "", "finish_reason": "stop"}\n', "answers 2"),
        ('{"id": 1, "text": "", "finish_reason": "stop"}\n' * 2, "answers 1"),
    ],
)
def test_a_file_of_something_else_is_not_touched(store: Store, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "out").write_text(content)
    with pytest.raises(RequestError, match=says):
        _answer(store, tmp_path / "out", LINES[:1])
    assert (tmp_path / "out").read_text() == content


def test_two_runs_never_write_one_file(store: Store, tmp_path: Path) -> None:
    from moestro.engine.batch_file import _Answers

    with _Answers(tmp_path / "out", [], "other"), pytest.raises(RequestError, match="Another process"):
        _answer(store, tmp_path / "out")


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 12))
def test_order_is_by_length_within_windows(lengths: list[int], window: int) -> None:
    order = by_length(lengths, window)
    assert sorted(order) == list(range(len(lengths)))
    for first in range(0, len(order), window):
        part = order[first : first + window]
        assert sorted(part) == list(range(first, first + len(part)))
        ordered = [lengths[place] for place in part]
        assert ordered == sorted(ordered, reverse=True)


def test_as_many_run_together_as_pay_and_fit(store: Store) -> None:
    subject = Subject.of_store(store)
    prompts, sampling = [[5] * 20] * 40, [SAMPLING] * 40
    small = options_for(subject, _options(store, 0.0, 1), prompts, sampling)
    large = options_for(subject, RuntimeOptions(memory="1GiB"), prompts, sampling)
    assert small.context == large.context == 26
    assert 1 <= small.max_sequences < large.max_sequences == 40
    asked = options_for(subject, RuntimeOptions(memory="1GiB", max_sequences=3, context=100), prompts[:2], sampling[:2])
    assert (asked.max_sequences, asked.context) == (3, 100)
    with pytest.raises(BudgetError):
        options_for(subject, RuntimeOptions(memory="1MiB"), prompts, sampling)
