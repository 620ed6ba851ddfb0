"""What each level costs in quality: stores of one checkpoint, packed in several ways, measured by `moestro eval`.

    python benchmarks/quality.py MODEL --text FILE [--text FILE ...] [--stores FOLDER] [--peers quality.json]
        [--levels 2,3,4,8] [--encodings nested,signs] [--dense-bits 16,8,4] [--full]
        [--window 256] [--max-tokens 24576] [--out docs/benchmarks/quality] [--calibrate FILE]

Packs MODEL into FOLDER with every encoding, calibrated and not, dense weights as they are; and with the first encoding,
calibrated, at the other dense bits (`--full`: all combinations). Each store is measured at each level against the raw
weights, over the same windows. Writes OUT.json, OUT.svg (quality against the true bits of an expert's weight) and a
Markdown table to standard output. `--peers` is a result of `peers/gguf_quality.py` over the same texts and windows: its
files become points of the plot and lines of the table. What OUT.json already holds is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MOESTRO = [sys.executable, "-m", "moestro.cli"]
COLOURS = ("#1f5fa8", "#c4511d", "#2f8f4e", "#7a4fa3", "#8a6d1b", "#3b8f9c")


@dataclass(frozen=True)
class Recipe:
    """How a store is packed."""

    encoding: str
    calibrated: bool
    dense_bits: int

    @property
    def name(self) -> str:
        """Name of the store's folder and of the line in the plot."""
        return f"{self.encoding}-{'calibrated' if self.calibrated else 'rounded'}-dense{self.dense_bits}"


def recipes(encodings: list[str], dense_bits: list[int], *, full: bool) -> Iterator[Recipe]:
    """Which stores are packed, in order."""
    for encoding, calibrated in itertools.product(encodings, (True, False)):
        main = calibrated and encoding == encodings[0]
        for bits in dense_bits if full or main else dense_bits[:1]:
            yield Recipe(encoding, calibrated, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--stores", type=Path, default=Path("quality-stores"))
    parser.add_argument("--levels", default="2,3,4,8")
    parser.add_argument("--encodings", default="nested,signs")
    parser.add_argument("--dense-bits", default="16,8,4")
    parser.add_argument("--full", action="store_true", help="all combinations")
    parser.add_argument("--calibrate", help="text to calibrate on (default: the one that comes with moestro)")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=24576)
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/quality"))
    arguments = parser.parse_args()
    common = ["--window", str(arguments.window), "--max-tokens", str(arguments.max_tokens)]
    common += ["--memory", arguments.memory, "--json"]
    common += [part for text in arguments.text for part in ("--text", str(text))]
    file = arguments.out.with_suffix(".json")
    whole = _known(file, arguments)
    if "raw" not in whole:
        whole["raw"] = _eval([arguments.model, "--raw", *common])
        _save(whole, file)
    done = {(one["name"], one["level"]) for one in whole["results"]}
    for recipe in recipes(arguments.encodings.split(","), _numbers(arguments.dense_bits), full=arguments.full):
        store = _pack(arguments, recipe)
        for level in _numbers(arguments.levels):
            if (recipe.name, level) in done:
                continue
            measured = _eval([str(store), "--reference", arguments.model, "--level", str(level), *common])
            whole["results"].append({"name": recipe.name, **asdict(recipe), **measured})
            _save(whole, file)
    if arguments.peers:
        whole["peers"] = _peers(arguments.peers, whole)
        _save(whole, file)
    print(table(whole))
    plot(whole, arguments.out.with_suffix(".svg"))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _known(file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured before in the same way, or an empty result."""
    setting = {
        "model": arguments.model,
        "texts": [text.name for text in arguments.text],
        "window": arguments.window,
        "max_tokens": arguments.max_tokens,
        "levels": arguments.levels,
        "calibrate": arguments.calibrate and Path(arguments.calibrate).name,
    }
    if file.exists():
        before: dict[str, Any] = json.loads(file.read_text())
        if before["setting"] == setting:
            return before
    return {"setting": setting, "results": []}


def _save(whole: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=2) + "\n")


def _pack(arguments: argparse.Namespace, recipe: Recipe) -> Path:
    store: Path = arguments.stores / recipe.name
    command = [*MOESTRO, "pack", arguments.model, str(store), "--levels", arguments.levels]
    command += ["--encoding", recipe.encoding, "--dense-bits", str(recipe.dense_bits)]
    if not recipe.calibrated:
        command.append("--no-calibration")
    elif arguments.calibrate:
        command += ["--calibrate", arguments.calibrate]
    arguments.stores.mkdir(parents=True, exist_ok=True)
    if not (store / "manifest.json").exists():
        print(f"packing {recipe.name}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return store


def _eval(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([*MOESTRO, "eval", *arguments], check=True, stdout=subprocess.PIPE)
    measured: dict[str, Any] = json.loads(done.stdout)
    for name in ("process_floor_bytes", "peak_rss_bytes", "memory_bytes", "model"):
        del measured[name]
    for text in measured["texts"]:
        text["name"] = Path(text["name"]).name
    print(f"perplexity {measured['perplexity']:.4f} at level {measured['level']}", file=sys.stderr, flush=True)
    return measured


def _peers(file: Path, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The peers' results, which must be of the same windows."""
    peers = json.loads(file.read_text())
    ours = (whole["setting"]["texts"], whole["raw"]["window"], whole["raw"]["windows"])
    theirs = (peers["texts"], peers["window"], peers["windows"])
    if ours != theirs:
        raise SystemExit(f"error: {file} was measured on other texts or windows: {theirs}, expected {ours}")
    return [{"name": f"llama.cpp {Path(one['file']).stem}", **one} for one in peers["results"]]


def table(whole: dict[str, Any]) -> str:
    """All results as Markdown, in the order in which they were measured."""
    lines = [
        "| store | level | bits per expert weight | dense bits | perplexity | KL to raw, nats a token | same choice |",
        "|---|---|---|---|---|---|---|",
        f"| raw | {whole['raw']['level']} | {whole['raw']['bits_per_weight']:.2f} | {whole['raw']['dense_bits']} "
        f"| {whole['raw']['perplexity']:.4f} | 0 | 100% |",
    ]
    for one in (*whole["results"], *whole.get("peers", ())):
        lines.append(
            f"| {one['name']} | {one.get('level', '')} | {one['bits_per_weight']:.2f} | {one['dense_bits']:.4g} "
            f"| {one['perplexity']:.4f} | {one['kl_to_raw']:.5f} | {one['same_choice']:.1%} |"
        )
    return "\n".join(lines)


def plot(whole: dict[str, Any], file: Path) -> None:
    """Divergence and perplexity against the true bits of an expert's weight, a line for each store, peers as points."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moestro"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    fields = (("kl_to_raw", "KL divergence from the raw model, nats per token"), ("perplexity", "perplexity"))
    for panel, (field, label) in zip(panels, fields, strict=True):
        names = list(dict.fromkeys(one["name"] for one in whole["results"]))
        for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
            points = sorted(
                (one["bits_per_weight"], one[field], one["level"]) for one in whole["results"] if one["name"] == name
            )
            dashes = "--" if "rounded" in name else "-"
            bits, values, _ = zip(*points, strict=True)
            panel.plot(bits, values, dashes, marker="o", markersize=4, color=colour, label=name)
        for one in whole.get("peers", ()):
            if one["bits_per_weight"] > 16:
                continue
            panel.plot(one["bits_per_weight"], one[field], "x", color="#555555")
            panel.annotate(
                one["name"].removeprefix("llama.cpp "),
                (one["bits_per_weight"], one[field]),
                xytext=(4, -7 if one["name"].endswith("-imatrix") else 3),
                textcoords="offset points",
                fontsize=6,
                color="#555555",
            )
        panel.set(xlabel="bits per expert weight, all bytes counted", ylabel=label)
        panel.grid(visible=True, linewidth=0.3)
    panels[0].set_yscale("log")
    panels[1].axhline(whole["raw"]["perplexity"], color="#999999", linewidth=0.8)
    panels[0].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
