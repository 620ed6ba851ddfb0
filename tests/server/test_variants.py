"""Variants over HTTP: named in requests, listed as they are on disk, mixed in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from cli.running import run
from engine.tiny import tiny_checkpoint
from moestro import LLM, SamplingParams
from moestro.store.variant_file import remove_variant
from server.running import NAME, Running, server
from variant_stores import Family, pack_family

PROMPTS = ["def main(argv):\n    ", "The dictionary", "Der Befehl", "1 + 2 ="]
NAMES = ["", "ada", "bob"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = tiny_checkpoint(folder / "base")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    made = pack_family(checkpoint, folder / "store", raw=False)
    made.add("ada", seed=1)
    made.add("bob", seed=2)
    return made


@pytest.fixture(scope="module")
def expected(family: Family) -> dict[tuple[str, str], str]:
    """What the Python API answers, by variant and prompt."""
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(family.store, memory="60MiB", context=256) as llm:
        return {
            (name, prompt): llm.generate(prompt, greedy, variant=name)[0].text for name in NAMES for prompt in PROMPTS
        }


@pytest.fixture(scope="module")
def running(family: Family) -> Iterator[Running]:
    with server(family.store) as started:
        started.until_ready()
        yield started


def _model(variant: str) -> str:
    return f"{NAME}:{variant}" if variant else NAME


def test_requests_for_several_variants_at_once_are_answered_as_alone(
    running: Running, expected: dict[tuple[str, str], str]
) -> None:
    client = running.client()

    def ask(asked: tuple[str, str]) -> str:
        name, prompt = asked
        answer = client.completions.create(
            model=_model(name), prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.model == _model(name)
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, expected))
    assert texts == list(expected.values())
    assert len({expected[name, PROMPTS[0]] for name in NAMES}) == 3


def test_chats_and_responses_and_streams_name_variants_too(
    running: Running, expected: dict[tuple[str, str], str]
) -> None:
    client, prompt = running.client(), PROMPTS[1]
    asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0}
    more = {"ignore_eos": True}
    whole = client.chat.completions.create(model=_model("ada"), extra_body=more, **asked)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == expected["ada", prompt]
    chunks = list(
        client.chat.completions.create(model=_model("bob"), stream=True, extra_body=more, **asked)  # type: ignore[call-overload]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected["bob", prompt]
    assert {chunk.model for chunk in chunks} == {_model("bob")}
    answer = client.responses.create(model=_model("ada"), input=prompt, max_output_tokens=12, temperature=0)
    assert answer.model == _model("ada")
    assert expected["ada", prompt].startswith(answer.output_text)
    base = client.chat.completions.create(model=f"{NAME}:base", extra_body=more, **asked)  # type: ignore[call-overload]
    assert base.model == NAME
    assert base.choices[0].message.content == expected["", prompt]


def test_the_list_is_what_is_on_disk(running: Running, family: Family) -> None:
    client = running.client()
    there = [NAME, f"{NAME}:ada", f"{NAME}:bob"]
    assert [model.id for model in client.models.list()] == there
    assert client.models.retrieve(f"{NAME}:ada").id == f"{NAME}:ada"
    family.add("cleo", seed=3)
    assert [model.id for model in client.models.list()] == [*there, f"{NAME}:cleo"]
    first = client.completions.create(model=f"{NAME}:cleo", prompt=PROMPTS[0], max_tokens=8, temperature=0)
    assert first.choices[0].text
    remove_variant(family.store, "cleo")
    assert [model.id for model in client.models.list()] == there
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=f"{NAME}:cleo", prompt=PROMPTS[0])
    assert caught.value.code == "model_not_found"
    assert "'tiny', 'tiny:ada', 'tiny:bob'" in str(caught.value)
    for wrong in ("cleo", f"{NAME}:", f"{NAME}:../ada", f"{NAME}:ada:bob"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=wrong, prompt=PROMPTS[0])


def test_commands_name_variants(family: Family, expected: dict[tuple[str, str], str], tmp_path: Path) -> None:
    flags = ["--max-tokens", "12", "--ignore-eos", "--memory", "60MiB", "--context", "256"]
    asked = ["--prompt", PROMPTS[0], *flags]
    assert run("generate", f"{family.store}:ada", *asked).stdout == expected["ada", PROMPTS[0]]
    assert run("generate", family.store, "--variant", "bob", *asked).stdout == expected["bob", PROMPTS[0]]
    refused = run("generate", f"{family.store}:cleo", *asked)
    assert refused.exit_code == 2
    assert "no variant named cleo" in " ".join(refused.stderr.split())
    text = tmp_path / "text.txt"
    text.write_text("def main(argv):\n    return 0\n" * 4)
    losses = [
        run("eval", name, "--text", text, "--window", "32", "--memory", "60MiB", "--json", *more)
        for name, more in ((family.store, ()), (f"{family.store}:ada", ()), (family.store, ("--variant", "ada")))
    ]
    assert not any(one.exit_code for one in losses), [one.stderr for one in losses]
    found = [json.loads(one.stdout)["loss"] for one in losses]

    assert found[1] == found[2] != found[0]
