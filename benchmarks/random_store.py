"""Pack a random checkpoint for measurements of speed, with four experts quantised and the others their copies.

    python benchmarks/random_store.py CHECKPOINT STORE [--dense-bits 8] [--levels 2,3,4,8] [--encoding nested]

CHECKPOINT is what `random_checkpoint.py` wrote. Bytes, layout, routing and dense weights are those of a store that
`moestro pack CHECKPOINT STORE --no-calibration` would make in many times the time; each expert has planes of its own on
disk and in memory, so speed is the same. What the experts compute is not that of the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from moestro.config import PackOptions
from moestro.memory.budget import format_bytes
from moestro.quant import make_encoding
from moestro.store.calibration_facts import CalibrationText
from moestro.store.data_free import encode_alone
from moestro.store.expert_work import ExpertWork, Findings
from moestro.store.pack import PackProgress, pack
from moestro.store.pack_plan import PackPlan

ORIGINALS = 4


class Copies:
    """Quantises the first experts of each layer shape and writes them over and over."""

    @property
    def text(self) -> CalibrationText | None:
        """None."""
        return None

    def scratch_bytes(self, plan: PackPlan) -> int:
        """None are needed."""
        del plan
        return 0

    def dense_units(self, plan: PackPlan) -> frozenset[int]:
        """None."""
        del plan
        return frozenset()

    def run(self, work: ExpertWork) -> Findings:
        """Write every expert that is missing."""
        encoding = make_encoding(work.plan.options.encoding)
        originals = {}
        for layer, entry in enumerate(work.plan.layers):
            for expert in range(entry.experts):
                if work.errors(layer, expert) is not None:
                    continue
                key = (entry.layout, expert % ORIGINALS)
                if key not in originals:
                    weights = work.weights(layer, expert % ORIGINALS)
                    originals[key] = weights, encode_alone(encoding, weights, work.plan.options.promised_levels)
                work.write(layer, expert, *originals[key])
        return Findings()


class Lines:
    """A line on standard error every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, step: PackProgress) -> None:
        if time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            print(f"{format_bytes(step.done_bytes)} of {format_bytes(step.total_bytes)}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--levels", default=PackOptions().levels)
    parser.add_argument("--exact-level", type=int, default=PackOptions().exact_level)
    parser.add_argument("--encoding", default=PackOptions().encoding)
    parser.add_argument("--dense-bits", type=int, default=PackOptions().dense_bits)
    arguments = parser.parse_args()
    options = PackOptions(
        levels=arguments.levels,
        exact_level=arguments.exact_level,
        encoding=arguments.encoding,
        dense_bits=arguments.dense_bits,
        calibration=False,
    )
    packed = pack(
        arguments.checkpoint, arguments.store, options=options, make_encoder=lambda *_: Copies(), progress=Lines()
    )
    print(f"{packed.path}: experts {format_bytes(packed.expert_bytes)}, dense {format_bytes(packed.dense_bytes)}")


if __name__ == "__main__":
    main()
