"""`moestro generate`: answer one prompt, or a file of them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson, Model
from moestro.cli.batch import answer_batch
from moestro.cli.boundary import say
from moestro.cli.console import print_json
from moestro.cli.opening import open_llm
from moestro.cli.picture import check_picture_path, draw_experts
from moestro.cli.report import summary, to_json
from moestro.config import RuntimeOptions, SamplingParams
from moestro.domain import AUTO
from moestro.errors import RequestError

if TYPE_CHECKING:
    from moestro import LLM, Completion
    from moestro.domain import Choice


def generate(
    model: Model,
    options: RuntimeOptions,
    sampling: SamplingParams,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to go on from.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A UTF-8 file with the prompt, taken as it is; `-` is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    as_json: AsJson = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG of which experts each layer used.", show_default=False)
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Write where the time went, for chrome://tracing or ui.perfetto.dev.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Answer each line of --prompt-file, a JSON object, with a line of this file; goes on where it ends.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer a prompt; the text streams to standard output, everything else goes to standard error."""
    if out is not None:
        _refuse_with_out(prompt=prompt, picture=picture)
        lines, name = _read_prompt(None, prompt_file), str(prompt_file)
        answer_batch(model, options, sampling, lines, out, name=name, chat=chat, timeline=timeline, as_json=as_json)
        return
    text = _read_prompt(prompt, prompt_file)
    if picture is not None:
        check_picture_path(picture)
    if timeline is not None:
        from moestro.engine.timeline import check_timeline_path

        check_timeline_path(timeline)
    unused = [
        name
        for name in ("top_p", "top_k", "min_p", "seed")
        if getattr(sampling, name) != getattr(SamplingParams(), name)
    ]
    if sampling.temperature == 0 and unused:
        say("note", f"{', '.join(unused)} changes nothing at temperature 0, which takes the likeliest token.")
    with open_llm(model, options) as llm:
        choice = llm.choose(text) if llm.options.variant == AUTO else None  # by the text alone, not by the template's
        whole = llm.chat_prompt([{"role": "user", "content": text}]) if chat else text
        with nullcontext() if timeline is None else llm.timeline(timeline):
            completion = _answer(llm, whole, sampling, choice, show=not as_json)
        stats = llm.stats()
        if picture is not None:
            tokens = completion.prompt_tokens + len(completion.token_ids)
            draw_experts(llm.expert_counts(), picture, model=model, tokens=tokens)
    if as_json:
        print_json(to_json(completion, stats))
    else:
        sys.stderr.write(summary(completion, stats) + "\n")


def _refuse_with_out(**flags: object) -> None:
    given = [f"--{name}" for name, value in flags.items() if value is not None]
    if given:
        raise RequestError(
            f"{' and '.join(given)} cannot be given with --out, which answers the lines of --prompt-file."
        )


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text from whichever of the two flags was given. Raises RequestError, OSError."""
    if (prompt is None) == (prompt_file is None):
        raise RequestError("Give the prompt with either --prompt TEXT or --prompt-file FILE (- for standard input).")
    text = prompt if prompt is not None else _read_file(str(prompt_file))
    if not text:
        raise RequestError("The prompt is empty. Expected at least one character of text.")
    return text


def _read_file(name: str) -> str:
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The prompt in {name} is not UTF-8 text ({error}).") from error


def _answer(
    llm: LLM, prompt: str | list[int], sampling: SamplingParams, choice: Choice | None, *, show: bool
) -> Completion:
    completion, variant = None, None if choice is None else choice.variant or ""
    for delta in llm.stream(prompt, sampling, variant=variant):
        completion = delta.completion
        if show:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    assert completion is not None
    if show and sys.stdout.isatty():
        sys.stdout.write("\n")
    return replace(completion, choice=choice)
