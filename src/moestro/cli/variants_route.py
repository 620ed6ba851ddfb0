"""`moestro variants route`: fit what sends a prompt to the variant fit for it, judge it, and ask it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.console import Row, print_json, print_table
from moestro.cli.options import Only
from moestro.cli.progress import Lines
from moestro.cli.variants import StoreName, open_store
from moestro.config import RouteOptions, RuntimeOptions
from moestro.errors import RouteError

if TYPE_CHECKING:
    from moestro.engine.domains import DomainScore, RouteProgress, RouteReport

# Only `trace` opens the model, and looks at single prompts.
_OPENING = Only("memory", "level", "threads")

ExampleFiles = Annotated[
    list[str],
    typer.Option(
        "--examples",
        help="NAME=FILE: prompts for the variant NAME, or for none of them (base); give the flag once for each file. A "
        ".jsonl file has a prompt a line: a string, or an object with prompt, text or messages. Any other is a UTF-8 "
        "text, cut at form feeds and line ends into prompts of about 1000 characters.",
    ),
]


def fit(
    store: StoreName,
    examples: ExampleFiles,
    what: RouteOptions,
    opening: Annotated[RuntimeOptions, _OPENING],
) -> None:
    """Learn from a few example prompts which of them are for which variant; requests then ask for STORE:auto."""
    from moestro.engine.domains import fit_router

    given = _read(examples, most=what.most_examples)
    router = fit_router(open_store(store), given, what, opening=opening, progress=Lines(_say_routed))
    counts = ", ".join(f"{len(some)} of {name}" for name, some in given.items())
    print_table(
        f"router of {store}",
        [
            ("classifier", router.classifier.kind),
            ("examples", str(sum(map(len, given.values()))), counts),
            ("told right", f"{router.left_out:.1%}", "of the examples, each left out of what was learnt"),
            ("threshold", f"{router.threshold:g}", "below it the base answers"),
        ],
    )


def evaluate(
    store: StoreName,
    examples: ExampleFiles,
    opening: Annotated[RuntimeOptions, _OPENING],
    most_examples: Annotated[int, typer.Option(help="Most prompts of a file, evenly spread over it (0: all).")] = 0,
    as_json: AsJson = False,
) -> None:
    """Tell how often the router sends prompts of known domains to the right variant, and what choosing costs."""
    from moestro.engine.domains import judge_router

    given = _read(examples, most=most_examples)
    report = judge_router(open_store(store), given, opening=opening, progress=Lines(_say_routed))
    if as_json:
        print_json(asdict(report))
    else:
        _draw(store, report)


def show(
    store: StoreName,
    prompt: Annotated[str, typer.Argument(help="The prompt's text.")],
    opening: Annotated[RuntimeOptions, _OPENING],
    as_json: AsJson = False,
) -> None:
    """Tell who would answer a prompt."""
    from moestro.engine.domains import choosing

    with choosing(open_store(store), opening) as (chooser, choose):
        choice, router = choose(prompt), chooser.router
    if as_json:
        print_json(asdict(choice))
        return
    rows: list[Row] = [
        ("answers", choice.variant or "base"),
        ("likeliest", choice.domain, f"{choice.confidence:.1%}, threshold {router.threshold:g}"),
        ("classifier", router.classifier.kind, f"knows {', '.join(router.domains)}"),
    ]
    if choice.tokens:
        rows.append(("extra work", f"{choice.tokens} tokens", f"under the base, {1e3 * choice.seconds:.1f} ms"))
    print_table(store, rows)


def _read(files: list[str], *, most: int) -> dict[str, list[str]]:
    """Prompts by name, in the order in which names come first."""
    from moestro.domain import read_examples

    if most < 0:
        raise RouteError(f"most_examples is {most}, expected a whole number of at least 0.")
    found: dict[str, list[str]] = {}
    for one in files:
        name, equals, file = one.partition("=")
        if not (name and equals and file):
            raise RouteError(f"--examples {one} is not NAME=FILE. Write --examples code=prompts.jsonl.")
        found.setdefault(name, []).extend(read_examples(Path(file).expanduser(), most=most))
    return found


def _say_routed(now: RouteProgress) -> None:
    say("note", f"{now.done} of {now.total} prompts")


def _draw(store: str, report: RouteReport) -> None:
    rows: list[Row] = [
        ("classifier", report.classifier, f"threshold {report.threshold:g}"),
        ("accuracy", f"{report.accuracy:.1%}", f"of {report.prompts} prompts; mean over domains {report.balanced:.1%}"),
        ("unsure", f"{report.below_threshold:.1%}", "answered by the base, likeliest for a variant"),
        ("choosing", f"{1e3 * report.choose_s / report.prompts:.2f} ms", "a prompt"),
    ]
    if report.domain_tokens:
        each = report.domain_tokens / report.prompts
        rows.append(("extra work", f"{each:.0f} tokens", f"a prompt, under the base: {report.domain_s:.1f} s in all"))
    print_table(store, rows)
    print_table("by domain: told right, answered by", [_row(name, one) for name, one in report.domains.items()])


def _row(name: str, score: DomainScore) -> Row:
    answered = ", ".join(f"{who} {count}" for who, count in score.answered_by.items())
    return name, f"{score.accuracy:.1%}", f"of {score.prompts}: {answered}"
