"""What must hold of a trace's arrays. Each check names the trace, the key, what was found and what was expected.

Shapes: N rows, L MoE layers, K experts per row, R requests, P layers ahead, C candidates of a lookahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.errors import TraceError

MOST_EXPERTS = 1 << 16
WEIGHT_SCALE = 255
"""Weights are shares of this."""


@dataclass(frozen=True)
class Checks:
    """Checks of one trace, which errors call `source`. All methods raise TraceError."""

    source: str

    def fail(self, key: str, message: str) -> TraceError:
        """The error to raise for a key."""
        return TraceError(f"{self.source}: {key} {message}")

    def array(self, key: str, array: np.ndarray, dtypes: tuple[type[np.generic], ...], shape: tuple[int, ...]) -> None:
        """The array's type is one of `dtypes` and its shape is `shape`, where -1 is any length of at least one."""
        if array.dtype.type not in dtypes:
            names = " or ".join(np.dtype(one).name for one in dtypes)
            raise self.fail(key, f"is of type {array.dtype}, expected {names}.")
        fits = array.ndim == len(shape) and all(
            wanted == found or (wanted == -1 and found > 0) for wanted, found in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if one == -1 else str(one) for one in shape)
            raise self.fail(key, f"has the shape {list(array.shape)}, expected [{wanted}].")

    def num_experts(self, number: int) -> None:
        if not 1 <= number <= MOST_EXPERTS:
            raise self.fail("num_experts", f"is {number}, expected 1 to {MOST_EXPERTS}.")

    def ids(self, key: str, experts: np.ndarray, num_experts: int) -> None:
        """Ids below the number of experts, along the last axis each only once."""
        largest = int(experts.max())
        if largest >= num_experts:
            raise self.fail(key, f"has expert {largest}, expected ids below num_experts = {num_experts}.")
        twice = np.zeros(experts.shape[:-1], dtype=bool)
        for one in range(1, experts.shape[-1]):
            for other in range(one):
                np.logical_or(twice, experts[..., one] == experts[..., other], out=twice)
        if twice.any():
            raise self.fail(key, f"has an expert twice in {_place(np.asarray(twice))}, expected different ones.")

    def weights(self, weights_NLK: np.ndarray) -> None:
        """Falling along K; they add up to 255, apart from what rounding did."""
        rising = np.any(weights_NLK[..., 1:] > weights_NLK[..., :-1], axis=-1)
        if rising.any():
            raise self.fail("weights", f"rise in {_place(rising)}, expected experts in falling order of weight.")
        picks = weights_NLK.shape[-1]
        sums_NL = weights_NLK.sum(axis=-1, dtype=np.int32)
        wrong = np.abs(sums_NL - WEIGHT_SCALE) > picks
        if wrong.any():
            found = int(sums_NL[wrong][0])
            raise self.fail("weights", f"add up to {found} in {_place(wrong)}, expected {WEIGHT_SCALE} +- {picks}.")

    def offsets(self, offsets_R1: np.ndarray, rows: int) -> None:
        """From 0 to the number of rows, every request with a row at least."""
        if offsets_R1[0] != 0 or offsets_R1[-1] != rows:
            found = f"{offsets_R1[0]} to {offsets_R1[-1]}"
            raise self.fail("offsets", f"go from {found}, expected 0 to {rows}, the number of rows.")
        lengths = np.diff(offsets_R1)
        if (lengths < 1).any():
            request = int(np.argmax(lengths < 1))
            raise self.fail("offsets", f"give request {request} {lengths[request]} rows, expected one at least.")

    def prompt_first(self, decode_N: np.ndarray, offsets_R1: np.ndarray) -> None:
        """No row of a prompt behind a decoded one of its request."""
        back = decode_N[:-1] & ~decode_N[1:]
        back[offsets_R1[1:-1] - 1] = False
        if back.any():
            row = int(np.argmax(back)) + 1
            raise self.fail("decode", f"has a row of the prompt behind decoded ones (row {row}), expected it before.")

    def steps(self, step_N: np.ndarray, decode_N: np.ndarray, offsets_R1: np.ndarray) -> None:
        """Never falling within a request; rows of one step are of one phase."""
        change = np.diff(step_N)
        change[offsets_R1[1:-1] - 1] = 1
        if (change < 0).any():
            row = int(np.argmax(change < 0)) + 1
            raise self.fail("step", f"falls from {step_N[row - 1]} to {step_N[row]} at row {row}, expected it to rise.")
        mixed = (change == 0) & (decode_N[1:] != decode_N[:-1])
        if mixed.any():
            row = int(np.argmax(mixed)) + 1
            raise self.fail("step", f"{step_N[row]} has rows of prompt and answer (row {row}), expected one phase.")

    def lookahead(self, lookahead_NPLC: np.ndarray, num_experts: int) -> None:
        """Valid ids for layers that exist, zeros for those past the last."""
        layers = lookahead_NPLC.shape[2]
        for ahead in range(1, lookahead_NPLC.shape[1] + 1):
            there, past = np.split(lookahead_NPLC[:, ahead - 1], [max(0, layers - ahead)], axis=1)
            if there.size:
                self.ids("lookahead", there, num_experts)
            if past.any():
                raise self.fail(
                    "lookahead", f"has ids for a layer past the last of {layers} ({ahead} ahead), expected zeros there."
                )


def _place(wrong: np.ndarray) -> str:
    """Where the first true element is: `row 5, layer 2`."""
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return ", ".join(f"{name} {index}" for name, index in zip(("row", "layer"), place, strict=True))
