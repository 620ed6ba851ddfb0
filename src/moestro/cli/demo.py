"""`moestro demo`: the main job on the model that comes with moestro, with what happened."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moestro.cli.console import notes, output, print_table
from moestro.cli.opening import locate_store, open_llm
from moestro.cli.options import Only
from moestro.cli.picture import check_picture_path, draw_experts
from moestro.cli.report import cache_rows, memory_rows, time_rows
from moestro.config import RuntimeOptions, SamplingParams

if TYPE_CHECKING:
    from moestro import LLM, Completion

MODEL = "tiny-qwen3moe-28m"
PROMPT = """\
Mixture \\Mix"ture\\, n. [L. mixtura.]
   1. The act of mixing, or the state of being mixed.
      [1913 Webster]

   2."""
SAMPLING = SamplingParams(max_tokens=200, temperature=0.7, top_p=0.9, seed=4)
CONTEXT = 512
ARENA_SHARE = 0.25
"""The part of the experts' bytes that fits into the arena."""


def demo(
    options: Annotated[RuntimeOptions, Only("level")],
    picture: Annotated[Path, typer.Option(help="Where to write the picture of which experts each layer used.")] = Path(
        "moestro-demo-experts.png"
    ),
) -> None:
    """Run the built-in model with room for a quarter of its experts, and show what happened."""
    check_picture_path(picture)
    store = locate_store(MODEL, auto_pack=True)
    options = _options(store, options.level)
    notes().print(f"{MODEL}, with memory for a quarter of its experts, continues this:\n", style="dim")
    with open_llm(str(store), options) as llm:
        started = time.monotonic()
        completion = _stream(llm)
        elapsed_s = time.monotonic() - started
        stats = llm.stats()
        tokens = completion.prompt_tokens + len(completion.token_ids)
        draw_experts(llm.expert_counts(), picture, model=MODEL, tokens=tokens)
    rows = [
        *memory_rows(stats),
        ("tokens per second", f"{completion.timings.decode_tokens_per_s:.1f}", f"{tokens} tokens, prompt included"),
        *cache_rows(stats),
        *time_rows(stats, elapsed_s),
    ]
    print_table("What happened", rows)
    output().print(f"\nWhich experts each layer used: see {picture}", soft_wrap=True)


def _options(store: Path, level: int) -> RuntimeOptions:
    """Memory for everything but experts as needed, and for a quarter of the experts."""
    from moestro.runtime.subject import Subject

    # What is shown is a model that does not fit: nothing is lent to make it.
    options = RuntimeOptions(context=CONTEXT, level=level, lend_kv=False)
    return replace(options, memory=str(Subject.open(str(store)).plan(options).bytes_for_experts(ARENA_SHARE)))


def _stream(llm: LLM) -> Completion:
    console = output()
    console.print(Text(PROMPT, style="bold"), end="", soft_wrap=True)
    completion = None
    for delta in llm.stream(PROMPT, SAMPLING):
        completion = delta.completion
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    assert completion is not None
    sys.stdout.write("\n\n")
    return completion
