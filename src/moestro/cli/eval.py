"""`moestro eval`: perplexity of a model on texts, and how far it is from its raw weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson, Model
from moestro.cli.boundary import say
from moestro.cli.console import Row, print_json, print_table
from moestro.cli.opening import locate_store
from moestro.cli.options import Only
from moestro.cli.progress import Lines, read_text
from moestro.config import RuntimeOptions
from moestro.errors import RequestError
from moestro.memory.budget import format_bytes
from moestro.store.variant_name import split_variant

if TYPE_CHECKING:
    from moestro.engine.evaluate import EvaluationProgress
    from moestro.engine.results import Evaluation

_OPTIONS = ("memory", "level", "quality", "level_policy", "threads", "policy", "variant", "auto_pack")


def evaluate(
    model: Model,
    options: Annotated[RuntimeOptions, Only(*_OPTIONS)],
    text: Annotated[
        list[Path], typer.Option("--text", help="A UTF-8 file to measure on; give the flag once for each file.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The raw model, for kl_to_raw when MODEL is a store: a checkpoint, or a store that is raw."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Measure the checkpoint's weights as they are.")] = False,
    window: Annotated[
        int, typer.Option(help="Tokens of a window; windows do not overlap (0: the model's context, at most 512).")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of all windows, which are then evenly spread over the texts (0: all).")
    ] = 0,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Feed tokens one at a time, as decoding does; slower.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on texts, and the mean KL divergence (nats per token) from the model's raw weights."""
    from moestro.engine.evaluate import evaluate as evaluate_store

    if raw and reference is not None:
        raise RequestError("--raw measures the raw model itself, so --reference has no use. Give one of the two.")
    if raw and options.level:
        raise RequestError("--raw measures weights as they are, which --level would not. Give one of the two.")
    model, variant = split_variant(model)
    if variant:
        options = replace(options, variant=variant)
    texts = [read_text(path) for path in text]
    store, raw_store = _locate(model, reference, raw=raw, auto_pack=options.auto_pack)
    measured = evaluate_store(
        store,
        texts,
        reference_path=raw_store,
        options=options,
        window=window,
        max_tokens=max_tokens,
        one_by_one=one_by_one,
        progress=Lines(_say_measured),
    )
    if measured.kl_to_raw is None:
        say("note", f"kl_to_raw was not measured: {model} is a store. Give its raw weights with --reference.")
    if as_json:
        print_json({"model": model, **asdict(measured)})
    else:
        _draw(model, measured)


def _locate(model: str, reference: str | None, *, raw: bool, auto_pack: bool) -> tuple[Path, Path | None]:
    """The store to measure and, if it can be told, the raw one to compare it with."""
    from moestro.engine.reference import require_raw
    from moestro.store.locate import locate_shapes
    from moestro.store.manifest import has_manifest
    from moestro.store.reader import Store

    is_store = has_manifest(locate_shapes(model))
    if raw:
        store = locate_store(model, auto_pack=auto_pack, raw=True)
        require_raw(Store.open(store))
        return store, None
    if reference is None and not is_store:
        reference = model
    store = locate_store(model, auto_pack=auto_pack)
    return store, None if reference is None else locate_store(reference, auto_pack=auto_pack, raw=True)


def _say_measured(now: EvaluationProgress) -> None:
    left = now.seconds / now.done * (now.total - now.done)
    say("measuring", f"{now.done} of {now.total} windows, perplexity {now.perplexity:.3f}, {left:.0f} s left")


def _draw(model: str, measured: Evaluation) -> None:
    rows: list[Row] = [("perplexity", f"{measured.perplexity:.4f}", f"{measured.loss:.4f} nats per token")]
    if measured.kl_to_raw is not None:
        rows += [
            ("KL to raw", f"{measured.kl_to_raw:.5f}", "nats per token"),
            ("raw perplexity", f"{measured.raw_perplexity:.4f}"),
            ("same choice", f"{100 * (measured.same_choice or 0):.1f}%", "tokens for which both find one likeliest"),
        ]
    rows += [
        ("level", str(measured.level)),
        ("bits per weight", f"{measured.bits_per_weight:.3f}", "all bytes of the experts' planes up to the level"),
        ("dense bits", str(measured.dense_bits)),
        ("tokens scored", str(measured.tokens), f"in {measured.windows} windows of {measured.window}"),
        ("tokens per second", f"{measured.tokens_per_s:.1f}"),
        ("memory given", format_bytes(measured.memory_bytes)),
    ]
    print_table(model, rows)
    if len(measured.texts) > 1:
        print_table(
            "perplexity by text",
            [(text.name, f"{text.perplexity:.4f}", f"{text.tokens} tokens") for text in measured.texts],
        )
