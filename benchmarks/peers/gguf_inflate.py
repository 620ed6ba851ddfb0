"""Make the experts of a GGUF file in Q4_0 wide, as `benchmarks/inflate.py` does it to a store of moestro.

    python benchmarks/peers/gguf_inflate.py MODEL.gguf INFLATED.gguf --times 64

The blocks of gate and up are repeated along the expert's width, those of down likewise, with the scale of each block
divided by `times`. Blocks are copied as they are: nothing is quantised again. Scales are fp16; a division that fp16
does not hold exactly is counted and its largest error printed. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

BLOCK, BLOCK_BYTES = 32, 18
WIDTH_KEYS = ("expert_feed_forward_length",)
UP, DOWN = ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "ffn_down_exps.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("inflated", type=Path)
    parser.add_argument("--times", type=int, required=True, help="a power of two")
    arguments = parser.parse_args()
    if arguments.times < 1 or arguments.times & (arguments.times - 1):
        parser.error(f"{arguments.times} is not a power of two")
    experts, dense, inexact, worst = inflate(arguments.model, arguments.inflated, arguments.times)
    print(
        f"{arguments.inflated}: experts {experts} bytes, dense weights {dense}, {dense / (dense + experts):.2%} of the "
        f"whole; {inexact} scales could not be divided exactly, the worst is {worst:.1%} off"
    )


def inflate(source: Path, destination: Path, times: int) -> tuple[int, int, int, float]:
    """Bytes of experts and of all else, scales that were rounded, the largest relative error among them."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(destination, architecture)
    _copy_fields(reader, writer, times)
    experts = dense = inexact = 0
    worst = 0.0
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if "_exps." in tensor.name:
            if tensor.tensor_type is not gguf.GGMLQuantizationType.Q4_0:
                raise SystemExit(f"error: {tensor.name} is {tensor.tensor_type.name}, expected Q4_0")
            if tensor.name.endswith(DOWN):
                data, rounded, error = _wider_down(data, times)
                inexact, worst = inexact + rounded, max(worst, error)
            else:
                assert tensor.name.endswith(UP), tensor.name
                data = np.tile(data, (1, times, 1))
            experts += data.nbytes
        else:
            dense += data.nbytes
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return experts, dense, inexact, worst


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, times: int) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if name.endswith(WIDTH_KEYS):
            value *= times
        writer.add_key_value(name, value, kind, sub_type=inner)


def _wider_down(data: np.ndarray, times: int) -> tuple[np.ndarray, int, float]:
    """Bytes [experts, outputs, blocks of the width]."""
    experts, outputs, row_bytes = data.shape
    blocks = data.reshape(experts, outputs, row_bytes // BLOCK_BYTES, BLOCK_BYTES).copy()
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    divided = (scales / times).astype(np.float16)
    error = np.abs(divided.astype(np.float32) * times - scales)
    relative = error / np.maximum(np.abs(scales), 1e-30)
    blocks[..., :2] = divided.view(np.uint8)
    return (
        np.tile(blocks, (1, 1, times, 1)).reshape(experts, outputs, -1),
        int((error > 0).sum()),
        float(relative.max()),
    )


if __name__ == "__main__":
    main()
