"""What a variant keeps of a fine-tune: its perplexity on the domain's text, by bits, method and bytes.

    python benchmarks/variants.py BASE --tuned NAME CHECKPOINT TEXT CALIBRATE [--tuned ...] [--stores FOLDER]
        [--settings GLOB ...] [--steps 100] [--window 256] [--windows 0] [--out docs/benchmarks/variants]

Packs BASE raw and as `pack` does by default, and each CHECKPOINT by default, into FOLDER; adds each fine-tune as a
variant in every setting (calibrated on CALIBRATE, or without a text), and puts what the files say, decoded, into
transformers' model: on the raw base, and on the base at its exact level, beside the fine-tune packed at that level.
TEXT is what it is judged by, never fitted to.

Writes OUT.json (what it holds already is not measured again) and a Markdown table to standard output.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.calibration import pack
from moestro.config import PackOptions, VariantOptions
from moestro.quant import LEVELS, make_encoding
from moestro.quant.delta_codes import delta_decode
from moestro.quant.flat import flat_decode
from moestro.quant.low_rank import LowRankRegion, Region, low_rank_decode
from moestro.store.dense_file import FLAT_BITS
from moestro.store.dtypes import TORCH_DTYPES
from moestro.store.reader import Store
from moestro.store.variant_file import StoredVariant, list_variants, open_variant, remove_variant
from moestro.variants.add import add_variant

State = dict[str, torch.Tensor]

SPOKEN = ("me-switch 2 bit, channels", "me-switch 4 bit, channels")
"""Settings whose greedy answers are kept, on the base at its exact level."""

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 2, 32, 40


def settings(steps: int) -> dict[str, VariantOptions]:
    """How variants are made, by name."""
    found = {}
    for bits in (1, 2, 4):
        for share in (0.0, 0.02):
            name = f"me-switch {bits} bit" + (", channels" if share else "")
            found[name] = VariantOptions(bits=bits, salient=share)
            if bits < 4:
                found[f"{name}, distilled"] = VariantOptions(bits=bits, salient=share, distill_steps=steps)
    found["me-switch 2 bit, channels, dense 4"] = VariantOptions(dense_delta_bits=4)
    found["me-switch 2 bit, channels, no text"] = VariantOptions(calibration=False)
    found["me-switch 2 bit, channels, sample text"] = VariantOptions()
    signs = {"method": "bitdelta", "bits": 1, "salient": 0.0}
    found["bitdelta"] = VariantOptions(**signs, calibration=False)
    found["bitdelta, distilled"] = VariantOptions(**signs, distill_steps=steps)
    found["delta-come 1 bit"] = VariantOptions(method="delta-come", bits=1)
    found["delta-come 2 bit"] = VariantOptions(method="delta-come", bits=2)
    return found


@dataclass(frozen=True)
class Tuned:
    """A fine-tune, the text that it is judged by, and one like those that it was made with."""

    name: str
    checkpoint: str
    text: Path
    calibrate: Path


class Judge:
    """Mean loss per token of a state of the model on a text, in nats."""

    def __init__(self, base: str, window: int, windows: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._window, self._windows = window, windows

    def windows(self, text: Path) -> torch.Tensor:
        """Token ids [windows, window], evenly spread over the text (0: all)."""
        ids = self.tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
        count = len(ids) // self._window
        rows = torch.tensor(ids[: count * self._window]).view(count, -1)
        return rows[torch.arange(self._windows) * count // self._windows] if 0 < self._windows < count else rows

    @torch.inference_mode()
    def loss(self, state: State, text: Path) -> float:
        """Of a whole state, tied names left out."""
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()
        total, count = 0.0, 0
        for batch in self.windows(text).split(8):
            logits = self.model(batch).logits[:, :-1].flatten(0, 1)
            total += float(functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
            count += batch[:, 1:].numel()
        return total / count

    @torch.inference_mode()
    def answers(self, state: State, text: Path) -> list[list[str]]:
        """Prompts out of the text, each with the greedy continuation."""
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()
        windows = self.windows(text)
        found = []
        for place in range(PROMPTS):
            prompt = windows[(2 * place + 1) * len(windows) // (2 * PROMPTS), :PROMPT_TOKENS].unsqueeze(0)
            made = self.model.generate(prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            found.append(
                [
                    str(self.tokenizer.decode(part))
                    for part in made[0].split([PROMPT_TOKENS, len(made[0]) - PROMPT_TOKENS])
                ]
            )
        return found


def store_state(store: Store, level: int) -> State:
    """Everything that a store holds, decoded at a level."""
    state: State = {}
    dense = store.dense_file.read_bytes()
    for name, one in store.dense.items():
        data = torch.frombuffer(bytearray(dense[one.offset : one.offset + one.nbytes]), dtype=torch.uint8)
        if one.dtype in FLAT_BITS:
            state[name] = flat_decode(data, *one.shape, FLAT_BITS[one.dtype])
        else:
            state[name] = data.view(TORCH_DTYPES[one.dtype]).view(one.shape).float()
    for layer in store.layers:
        experts = [_expert(store, layer.layer, expert, level) for expert in range(layer.num_experts)]
        for name in experts[0]:
            state[f"{layer.module}.{name}"] = torch.stack([expert[name] for expert in experts])
    return state


def _expert(store: Store, layer: int, expert: int, level: int) -> State:
    planes = []
    for place in range(len(store.layers[layer].layout.planes)):
        extent = store.plane((layer, expert, place))
        with extent.file.open("rb") as file:
            file.seek(extent.offset)
            planes.append(torch.frombuffer(bytearray(file.read(extent.nbytes)), dtype=torch.uint8))
    found: State = {}
    layouts = store.layers[layer].layout.planes
    for one in layouts[0].tensors:
        own = planes[0][one.offset : one.offset + one.nbytes]
        if one.group_size is None:
            found[one.name] = own.view(TORCH_DTYPES[one.dtype]).view(one.shape).float()
            continue
        regions = []
        for layout, plane in zip(layouts[: LEVELS.index(level) + 1], planes, strict=False):
            at = next(tensor for tensor in layout.tensors if tensor.name == one.name)
            regions.append(plane[at.offset : at.offset + at.nbytes])
        found[one.name] = make_encoding(one.dtype).decode(regions, *one.shape, level)
    return found


def variant_deltas(store: Store, variant: StoredVariant) -> tuple[State, State]:
    """What a variant adds, by name, and what it puts in place."""
    data = torch.frombuffer(bytearray(variant.dense_file.read_bytes()), dtype=torch.uint8)
    added = {
        name: decoded(data[one.offset : one.offset + one.nbytes], one.region)
        for name, one in variant.dense_deltas.items()
    }
    placed = {
        name: data[one.offset : one.offset + one.nbytes].view(TORCH_DTYPES[one.dtype]).view(one.shape).float()
        for name, one in variant.replacements.items()
    }
    planes = torch.frombuffer(bytearray(variant.planes_file.read_bytes()), dtype=torch.uint8)
    for layer in store.layers:
        up, down, up_at, down_at, _ = variant.expert_spec(layer.layer)
        for name, region, at in (("gate_up_proj", up, up_at), ("down_proj", down, down_at)):
            if region is None:
                continue
            whole = torch.zeros((layer.num_experts, region.rows, region.columns))
            for expert in range(layer.num_experts):
                extent = variant.plane(layer.layer, expert)
                if extent is not None:
                    start = extent.offset + at
                    whole[expert] = decoded(planes[start : start + region.nbytes], region)
            added[f"{layer.module}.{name}"] = whole
    return added, placed


def decoded(data: torch.Tensor, region: Region) -> torch.Tensor:
    """The delta that its bytes stand for."""
    return low_rank_decode(data, region) if isinstance(region, LowRankRegion) else delta_decode(data, region)


def applied(base: State, added: State, placed: State) -> State:
    """The model that a variant stands for on this base."""
    return {name: placed[name] if name in placed else values + added.get(name, 0.0) for name, values in base.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tuned", nargs=4, action="append", required=True)
    parser.add_argument("--stores", type=Path, default=Path("variant-stores"))
    parser.add_argument("--settings", nargs="+", default=["*"], help="settings with such names only, in this order")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/variants"))
    arguments = parser.parse_args()
    fine_tunes = [Tuned(name, checkpoint, Path(text), Path(near)) for name, checkpoint, text, near in arguments.tuned]
    file = arguments.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    bench = Bench(arguments, results, file)
    for tuned in fine_tunes:
        bench.measure(tuned)
    print(table(results))


class Bench:
    """Measures what is not known yet."""

    def __init__(self, arguments: argparse.Namespace, results: dict[str, Any], file: Path) -> None:
        self._arguments, self._results, self._file = arguments, results, file
        self._judge = Judge(arguments.base, arguments.window, arguments.windows)
        folder: Path = arguments.stores
        self._raw = pack(Path(arguments.base), folder / "base-raw", options=PackOptions(levels="raw"))
        self._packed = pack(Path(arguments.base), folder / "base", options=PackOptions())
        self._level = self._packed.manifest.exact_level
        self._whole = 2 * sum(values.numel() for values in store_state(self._raw, 16).values())

    def measure(self, tuned: Tuned) -> None:
        """A fine-tune in all settings."""
        results = self._results.setdefault(tuned.name, {"settings": {}})
        options = settings(self._arguments.steps)
        wanted = [name for glob in self._arguments.settings for name in fnmatch.filter(options, glob)]
        left = [name for name in dict.fromkeys(wanted) if name not in results["settings"]]
        if "base" in results and not left:
            return
        raw, level = store_state(self._raw, 16), store_state(self._packed, self._level)
        full = pack(
            Path(tuned.checkpoint), self._arguments.stores / f"{tuned.name}-raw", options=PackOptions(levels="raw")
        )
        theirs = store_state(full, 16)
        if "base" not in results:
            packed = pack(Path(tuned.checkpoint), self._arguments.stores / tuned.name, options=PackOptions())
            results["base"] = [self._judge.loss(state, tuned.text) for state in (raw, level)]
            theirs_level = store_state(packed, self._level)
            results["full"] = [self._judge.loss(state, tuned.text) for state in (theirs, theirs_level)]
            results["answers"] = {
                "base": self._judge.answers(level, tuned.text),
                "fine-tune": self._judge.answers(theirs_level, tuned.text),
            }
            self._save()
        for name in left:
            started = time.monotonic()
            added, placed, nbytes = self._variant(tuned, name, options[name])
            seconds = time.monotonic() - started
            losses = [self._judge.loss(applied(base, added, placed), tuned.text) for base in (raw, level)]
            results["settings"][name] = {"loss": losses, "bytes": nbytes, "share": nbytes / self._whole}
            if name in SPOKEN:
                results.setdefault("answers", {})[name] = self._judge.answers(applied(level, added, placed), tuned.text)
            self._save()
            print(f"{tuned.name}: {name}: {losses[0]:.4f} {losses[1]:.4f}, {seconds:.0f} s", flush=True)

    def _variant(self, tuned: Tuned, name: str, options: VariantOptions) -> tuple[State, State, int]:
        if (options.calibrates or options.distill_steps) and not name.endswith("sample text"):
            options = replace(options, calibrate=str(tuned.calibrate))
        for old in list_variants(self._raw.path):
            remove_variant(self._raw.path, old)
        variant = add_variant(self._raw, "one", tuned.checkpoint, options=options)
        return *variant_deltas(self._raw, open_variant(self._raw, "one")), variant.manifest.nbytes

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Markdown: losses in nats, and the share of the fine-tune's gain that is kept."""
    lines = []
    for name, one in results.items():
        (base, base_4), (full, full_4) = one["base"], one["full"]
        lines += [
            f"\n### {name}: {base:.4f} nats a token for the base, {full:.4f} for the fine-tune; "
            f"{base_4:.4f} and {full_4:.4f} at the exact level\n",
            "| variant | of 16 bits | nats, raw base | gain kept | nats, base at its exact level | gain kept |",
            "|---|---|---|---|---|---|",
        ]
        order = list(settings(steps=0))
        for setting, found in sorted(one["settings"].items(), key=lambda item: order.index(item[0])):
            raw, level = found["loss"]
            lines.append(
                f"| {setting} | {found['share']:.3f} | {raw:.4f} | {(base - raw) / (base - full):.1%} "
                f"| {level:.4f} | {(base_4 - level) / (base_4 - full_4):.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
