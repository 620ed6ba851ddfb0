"""`moestro trace`: record which experts a model uses, look at traces, and bring them from and to other tools."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson, Model
from moestro.cli.boundary import say
from moestro.cli.console import print_json, print_table
from moestro.cli.opening import locate_store, split_model
from moestro.cli.options import Only
from moestro.cli.picture import check_picture_path
from moestro.cli.progress import Lines, read_text
from moestro.cli.trace_picture import draw_trace
from moestro.config import RuntimeOptions, SamplingParams
from moestro.errors import RequestError, TraceError

if TYPE_CHECKING:
    from moestro.engine.record import RecordProgress
    from moestro.engine.windows import Text
    from moestro.trace import Trace
    from moestro.trace.summary import Summary

# A trace tells of every token and knows no memory.
_OPENING = Only(*(one.name for one in fields(RuntimeOptions) if one.name not in ("prefix_cache", "lend_kv")))

TraceFile = Annotated[Path, typer.Argument(help="A trace, as `moestro trace record` writes it.")]
Experts = Annotated[
    int, typer.Option(help="Experts of a layer, for files that do not say it (0: the largest id plus one).")
]


def record(
    model: Model,
    options: Annotated[RuntimeOptions, _OPENING],
    sampling: SamplingParams,
    out: Annotated[Path, typer.Option(help="The trace to write, a .npz file.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A text to answer; give the flag once for each.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A UTF-8 file with a prompt, taken as it is; once for each.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="A UTF-8 file to follow in windows; once for each.")
    ] = None,
    window: Annotated[
        int, typer.Option(help="Tokens of a window of a text (0: the model's context, at most 512).")
    ] = 0,
    text_tokens: Annotated[
        int, typer.Option(help="Most tokens of all windows, which are then evenly spread over the texts (0: all).")
    ] = 0,
    prompt_tokens: Annotated[
        int, typer.Option(help="First tokens of a window that are its prompt, the others being decoded (0: all).")
    ] = 0,
    lookahead: Annotated[
        int, typer.Option(help="Record what the gates of so many further layers make of each hidden state.")
    ] = 0,
) -> None:
    """Run a model on prompts or texts and write down which experts every token was routed to."""
    from moestro.engine.record import record_answers, record_texts

    prompts = _prompts(prompt or [], prompt_file or [])
    if bool(prompts) == bool(text):
        raise RequestError("Give what to run with either --prompt or --prompt-file, or with --text.")
    if prompts and (window or text_tokens or prompt_tokens):
        raise RequestError("--window, --text-tokens and --prompt-tokens are for --text. Leave them out.")
    if text and (sampling != SamplingParams() or _differ(options, "context", "max_sequences")):
        raise RequestError(
            "A text is followed as it is, window by window: sampling flags, --context and --max-sequences are for "
            "prompts. Leave them out."
        )
    _check_out(out, ".npz")
    model, options = split_model(model, options)
    store = locate_store(model, auto_pack=options.auto_pack)
    if prompts:
        trace = record_answers(
            store, prompts, options=options, sampling=sampling, lookahead=lookahead, progress=Lines(_say_recorded)
        )
    else:
        trace = record_texts(
            store,
            [read_text(path) for path in text or []],
            options=options,
            window=window,
            max_tokens=text_tokens,
            prompt_tokens=prompt_tokens,
            lookahead=lookahead,
            progress=Lines(_say_recorded),
        )
    trace.save(out)
    say("note", f"{trace.rows} tokens of {trace.requests} request(s) are in {out}.")


def show(
    trace_file: TraceFile,
    experts: Experts = 0,
    most: Annotated[int, typer.Option(help="Requests that are listed and drawn at most (0: all).")] = 20,
    plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of the experts used, in all and by request.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a trace: how much, and how often experts come again."""
    from moestro.trace.summary import summarise

    if plot is not None:
        check_picture_path(plot)
    trace = _load(trace_file, experts)
    requests = range(min(trace.requests, most or trace.requests))
    whole, each = summarise(trace), [summarise(trace, request) for request in requests]
    if plot is not None:
        draw_trace(trace, plot, requests=requests)
    if as_json:
        listed = [{**trace.meta[request], **asdict(one)} for request, one in zip(requests, each, strict=True)]
        print_json({**_facts(trace), **asdict(whole), "listed": listed})
    else:
        _draw(trace, whole, each)


def export_(
    trace_file: TraceFile,
    out: Annotated[Path, typer.Option(help="The file to write: .npz, or .parquet (needs pyarrow).")],
    experts: Experts = 0,
) -> None:
    """Write a trace for other tools, as npz or as a parquet table with a row for each token."""
    from moestro.trace.exchange import SUFFIXES, export_parquet

    _check_out(out, *SUFFIXES)
    trace = _load(trace_file, experts)
    if out.suffix.lower() == ".npz":
        trace.save(out)
    else:
        export_parquet(trace, out)


def import_(
    file: Annotated[Path, typer.Argument(help="An npz file with the keys of a trace, from elsewhere.")],
    out: Annotated[Path, typer.Option(help="The trace to write, a .npz file.")],
    experts: Experts = 0,
) -> None:
    """Check a trace from elsewhere down to each number, tidy it and write it as moestro does."""
    from moestro.trace.exchange import import_trace

    _check_out(out, ".npz")
    trace = import_trace(file, num_experts=experts or None)
    trace.save(out)
    say("note", f"{trace.rows} tokens of {trace.requests} request(s) are in {out}.")


def fit(
    store: Annotated[Path, typer.Argument(help="The store of the model that was recorded.")],
    traces: Annotated[list[Path], typer.Argument(help="Traces to learn from, as many as there are.")],
    epochs: Annotated[int, typer.Option(help="How often the traces are gone through.")] = 8,
) -> None:
    """Train the predictor of experts that a store's model runs with; minutes on a processor."""
    from moestro.foresight import TrainingOptions, fit_store
    from moestro.trace import Trace
    from moestro.trace.join import join

    if epochs < 1:
        raise TraceError(f"epochs is {epochs}, expected a whole number of at least 1.")
    trace = join([Trace.load(path) for path in traces])

    def progress(layers: int) -> None:
        say("training", f"layer {layers} of {trace.layers}")

    fit_store(store, trace, TrainingOptions(epochs=epochs), progress=progress)
    say("note", f"{store} has learned from {trace.rows} tokens of {trace.requests} request(s).")


def _load(path: Path, experts: int) -> Trace:
    from moestro.trace import Trace

    return Trace.load(path, num_experts=experts or None)


def _prompts(prompts: list[str], files: list[Path]) -> list[Text]:
    from moestro.engine.windows import Text

    found = [*(Text("prompt", one) for one in prompts), *(read_text(path) for path in files)]
    for one in found:
        if not one.content:
            raise RequestError(f"The prompt of {one.name} is empty. Expected at least one character of text.")
    return found


def _differ(options: RuntimeOptions, *names: str) -> bool:
    return any(getattr(options, name) != getattr(RuntimeOptions(), name) for name in names)


def _check_out(out: Path, *suffixes: str) -> None:
    """Find out before any work whether a file could be written. Raises TraceError."""
    if out.suffix.lower() not in suffixes:
        raise TraceError(f"The file {out} does not end in {' or '.join(suffixes)}. Give it such a name.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise TraceError(f"{out} cannot be written: it is a folder, or its folder does not exist. Make that first.")


def _say_recorded(now: RecordProgress) -> None:
    say("recording", f"{now.done} of {now.total} requests")


def _facts(trace: Trace) -> dict[str, object]:
    ahead = trace.lookahead_NPLC
    return {
        "path": trace.source,
        "requests": trace.requests,
        "rows": trace.rows,
        "layers": trace.layers,
        "experts": trace.num_experts,
        "picks": trace.picks,
        "lookahead": 0 if ahead is None else ahead.shape[1],
    }


def _draw(trace: Trace, whole: Summary, each: list[Summary]) -> None:
    facts = _facts(trace)
    routed = f"{trace.picks} of {trace.num_experts} in each of {trace.layers} MoE layers"
    print_table(
        trace.source,
        [
            ("requests", str(trace.requests)),
            ("tokens", str(trace.rows), f"{whole.prompt_rows} of prompts, {whole.decode_rows} decoded"),
            ("experts", routed, f"{whole.used:.0%} used at all"),
            ("used again", _percent(whole.repeated), "of a token's experts, by the token before in the same layer"),
            ("Gini of loads", f"{whole.gini:.2f}", "0: all experts alike, 1: all on one"),
            ("lookahead", f"{facts['lookahead']} layers"),
        ],
    )
    more = trace.requests - len(each)
    print_table(
        "by request: tokens of prompt and answer, experts used, used again, Gini",
        [
            (
                str(number),
                f"{one.prompt_rows:5} {one.decode_rows:5} {one.used:5.0%} {_percent(one.repeated):>5} {one.gini:5.2f}",
                str(trace.meta[number].get("dataset", "")),
            )
            for number, one in enumerate(each)
        ],
    )
    if more:
        say("note", f"{more} more request(s) are not listed; --most 0 lists all.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
