"""Decoding for several variants at once, beside the base alone, and how long it takes until another variant answers.

    python benchmarks/variants_serving.py STORE --variants A,B,C,D [--at-once 4,16] [--rounds 3] [--new 32]
        [--checkpoint FOLDER] [--prompt-tokens 16]

Everything is in memory. Each round decodes the same prompts, so many at once, for the base alone, for the first variant
alone, for all variants in turn, and for these and the base in turn; reported are medians of tokens per second, range,
and the ratio to the base. Then each variant, none of whose bytes are in memory (nor in the page cache), answers one
prompt of one token with one token: medians, beside the same prompt on the base; and, with `--checkpoint`, beside
transformers loading that full fine-tune from a page cache that does not hold it and answering.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cgroup import evict
from transformers import AutoModelForCausalLM

from moestro import LLM, SamplingParams
from moestro.store.variant_file import variant_folder


def main() -> None:
    given = _arguments()
    variants = given.variants.split(",")
    most = max(map(int, given.at_once.split(",")))
    with LLM(given.store, memory=given.memory, context=given.prompt_tokens + given.new, max_sequences=most) as llm:
        for at_once in map(int, given.at_once.split(",")):
            _batches(llm, given, at_once, variants)
        _switching(llm, given, variants)
    if given.checkpoint:
        _load_whole(given.checkpoint)


def _batches(llm: LLM, given: argparse.Namespace, at_once: int, variants: list[str]) -> None:
    ways = {
        "base": [""],
        "one variant": variants[:1],
        f"{len(variants)} variants": variants,
        f"{len(variants)} variants and base": ["", *variants],
    }
    prompts = [
        [(7 * number + 3 * place) % 4000 + 1 for place in range(given.prompt_tokens)] for number in range(at_once)
    ]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, among in ways.items():
            asked = [among[place % len(among)] for place in range(at_once)]
            done = llm.generate(prompts, SamplingParams(max_tokens=given.new, ignore_eos=True), variant=asked)
            seconds = max((given.new - 1) / one.timings.decode_tokens_per_s for one in done)
            if number:  # the first round brings everything into memory
                rates[name].append(at_once * (given.new - 1) / seconds)
    base = statistics.median(rates["base"])
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"| {at_once} | {name} | {middle:.1f} ({min(found):.1f} to {max(found):.1f}) | {middle / base:.2f} |")


def _switching(llm: LLM, given: argparse.Namespace, variants: list[str]) -> None:
    found: dict[str, list[float]] = {"base, in memory": [], "variant, on disk": [], "variant, in memory": []}
    for _ in range(given.rounds):
        for name in variants:
            llm.generate([1], SamplingParams(max_tokens=1))
            found["base, in memory"].append(_first(llm, ""))
            llm.flush()
            evict(*(one for one in variant_folder(Path(given.store), name).iterdir() if one.is_file()))
            found["variant, on disk"].append(_first(llm, name))
            found["variant, in memory"].append(_first(llm, name))
    for way, seconds in found.items():
        middle = 1e3 * statistics.median(seconds)
        print(f"first token, {way}: {middle:.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})")


def _first(llm: LLM, variant: str) -> float:
    started = time.perf_counter()
    llm.generate([1], SamplingParams(max_tokens=1, ignore_eos=True), variant=variant)
    return time.perf_counter() - started


def _load_whole(checkpoint: Path) -> None:
    evict(*checkpoint.glob("*.safetensors"))
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    print(f"first token, transformers loading the whole fine-tune: {1e3 * (time.perf_counter() - started):.0f} ms")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--variants", required=True)
    parser.add_argument("--memory", default="8GiB", help="enough for everything")
    parser.add_argument("--at-once", default="4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--checkpoint", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
