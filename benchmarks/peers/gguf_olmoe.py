"""Write a random GGUF model of the shape of OLMoE-1B-7B, Q4_0 throughout, for speed comparisons with llama.cpp.

    python benchmarks/peers/gguf_olmoe.py FILE.gguf [--layers N] [--seed 0]

3.9 GB; one tensor is in memory at a time (75 MB). Needs `pip install gguf`. Like the checkpoint of
`benchmarks/random_checkpoint.py`, it routes almost evenly, and the embeddings outweigh what random layers add to them.
There is no tokenizer in it: llama-bench needs none.

llama.cpp's loader of this architecture wants an output.weight of its own, and norms of keys and queries over their full
width; the router's weights are not renormalised after the choice of the best eight, as in the published model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

LAYERS, EXPERTS, ACTIVE = 16, 64, 8
HIDDEN, WIDTH, HEADS, VOCABULARY, CONTEXT = 2048, 1024, 16, 50304, 4096
Q4_0, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32

CODES = np.arange(16, dtype=np.uint8)
CODES[0] = 8
"""Codes of 4 bits, of which any is as likely, for those that are drawn: 0, for -8, has nothing opposite to it. With it
weights had a mean, which all tokens share and layers amplify: routers picked nearly the same experts for all tokens."""

PAIRS = (CODES[:, None] << 4 | CODES).ravel()
"""The same for the two codes of a byte."""

CODE_DEVIATION = float(np.std(CODES - 8.0))

Shape = tuple[int, ...]
Type = gguf.GGMLQuantizationType
Tensor = tuple[str, Shape, Type, float]
"""Name, shape (rows of the last dimension are contiguous), type, and the factor on a deviation of 1/sqrt(inputs)."""


def tensors(layers: int) -> Iterator[Tensor]:
    """All tensors of the model, in the order of the file."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN), Q4_0, HIDDEN**0.5
    yield "output_norm.weight", (HIDDEN,), F32, 1.0
    yield "output.weight", (VOCABULARY, HIDDEN), Q4_0, 1.0
    for layer in range(layers):
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (HIDDEN,), F32, 1.0
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", (HIDDEN, HIDDEN), Q4_0, 1.0
        yield f"blk.{layer}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), F32, 1.0
        for name, shape in (
            ("ffn_gate_exps", (EXPERTS, WIDTH, HIDDEN)),
            ("ffn_up_exps", (EXPERTS, WIDTH, HIDDEN)),
            ("ffn_down_exps", (EXPERTS, HIDDEN, WIDTH)),
        ):
            yield f"blk.{layer}.{name}.weight", shape, Q4_0, 1.0


def values(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, factor: float, random: np.random.Generator
) -> np.ndarray:
    """Random contents: norms are 1, other weights have a deviation of factor / sqrt(inputs)."""
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    deviation = factor / shape[-1] ** 0.5
    if kind == F32:
        return (deviation * random.standard_normal(shape)).astype(np.float32)
    # A Q4_0 block: an fp16 scale, then 32 codes of 4 bits that stand for -8 to 7.
    blocks = int(np.prod(shape)) // 32
    data = np.empty((blocks, 18), dtype=np.uint8)
    data[:, :2] = np.full(blocks, deviation / CODE_DEVIATION, dtype=np.float16).view(np.uint8).reshape(blocks, 2)
    data[:, 2:] = PAIRS[np.frombuffer(random.bytes(16 * blocks), dtype=np.uint8)].reshape(blocks, 16)
    return data.reshape(*shape[:-1], shape[-1] // 32 * 18)


def write(path: Path, layers: int, seed: int) -> None:
    """Write the whole file."""
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_name("random-olmoe-1b-7b")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, shape, kind, _ in tensors(layers):
        nbytes = int(np.prod(shape)) // 32 * 18 if kind == Q4_0 else 4 * int(np.prod(shape))
        dtype = np.dtype(np.uint8 if kind == Q4_0 else np.float32)
        stored = (*shape[:-1], shape[-1] // 32 * 18) if kind == Q4_0 else shape
        writer.add_tensor_info(name, stored, dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for _, shape, kind, factor in tensors(layers):
        writer.write_tensor_data(values(shape, kind, factor, random))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer layers than the published model has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.file, arguments.layers, arguments.seed)


if __name__ == "__main__":
    main()
