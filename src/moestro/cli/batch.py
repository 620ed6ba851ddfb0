"""`moestro generate --prompt-file F --out G`: answer a file of requests."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.cli.boundary import say
from moestro.cli.console import print_json
from moestro.cli.opening import locate_store
from moestro.cli.progress import Lines
from moestro.cli.report import share
from moestro.config import RuntimeOptions, SamplingParams
from moestro.memory.budget import format_bytes
from moestro.store.variant_name import split_variant

if TYPE_CHECKING:
    from moestro.engine.batch_file import BatchReport, Done


def answer_batch(
    model: str,
    options: RuntimeOptions,
    sampling: SamplingParams,
    text: str,
    out: Path,
    *,
    name: str,
    chat: bool,
    timeline: Path | None,
    as_json: bool,
) -> None:
    """Answer the requests in `text`, the content of the file `name`; what was done goes to standard error."""
    from moestro.engine.batch_file import answer_file, read_requests
    from moestro.engine.timeline import check_timeline_path
    from moestro.store.reader import Store

    requests = read_requests(text, name, sampling)
    if timeline is not None:
        check_timeline_path(timeline)
    model, variant = split_variant(model)
    options = replace(options, variant=variant or options.variant)
    store = Store.open(locate_store(model, auto_pack=options.auto_pack))
    lines: Lines[Done] = Lines(lambda done: say("note", f"{done.done} of {done.total} answered"))
    report = answer_file(store, options, requests, out, name=name, chat=chat, timeline=timeline, progress=lines)
    if as_json:
        print_json(asdict(report))
    else:
        say("note", _summary(report))


def _summary(report: BatchReport) -> str:
    before = f", {report.answered_before} of them before" if report.answered_before else ""
    stats = report.stats
    if stats is None:
        return f"all {report.requests} requests had been answered"
    waited_s = sum(seconds for part, seconds in stats.time_s.items() if part.endswith(("_queue", "_read")))
    return (
        f"{report.requests} requests answered{before}: {report.tokens} tokens at {report.tokens_per_s:.1f} tokens/s, "
        f"up to {report.max_sequences} at once in contexts of {report.context} tokens; "
        f"{format_bytes(stats.bytes_read)} read, {share(waited_s, stats.wall_s)} of the time waiting for the disk"
    )
