"""Perplexity and divergence of GGUF files in llama.cpp, over the same windows of tokens as `moestro eval`.

    PYTHONPATH=LLAMA_CPP/python python benchmarks/peers/gguf_quality.py FOLDER --text FILE [--text FILE ...]
        [--model CHECKPOINT] [--window 256] [--max-tokens 49152] [--out quality.json] [--threads 2]

FOLDER is what `gguf_qwen3moe.py` wrote: f32.gguf is the reference, all other files are measured against it. Token ids
come from the checkpoint's own tokenizer and go through the Python binding (`llama_cpp_build.sh`; it needs diskcache),
so no tokenizer and no choice of scored positions differs. With the KV cache in fp32, f32.gguf must agree with
transformers: both perplexities are in the result, and a difference of more than 0.1% is an error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.engine.windows import Text, Window, cut_windows
from moestro.store.locate import locate_source


class Peer:
    """One GGUF file open in llama.cpp."""

    def __init__(self, file: Path, window: int, threads: int) -> None:
        self.file = file
        self.loss = self.divergence = self.same_choice = 0.0
        self._llama = Llama(
            model_path=str(file),
            n_ctx=window,
            n_batch=window,
            n_ubatch=window,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            verbose=False,
        )

    def log_probabilities(self, token_ids: tuple[int, ...]) -> np.ndarray:
        """What each token but the last predicts: float64 [tokens - 1, vocabulary]."""
        self._llama.reset()
        self._llama.eval(list(token_ids[:-1]))
        return log_softmax(self._llama.scores[: len(token_ids) - 1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def measure(files: list[Path], windows: list[Window], window: int, threads: int) -> Iterator[dict[str, object]]:
    """One result for each file; the first is the reference of all."""
    peers = [Peer(file, window, threads) for file in files]
    tokens = 0
    for number, one in enumerate(windows):
        rows = slice(one.first_scored - 1, None)
        next_ids = np.array(one.token_ids[one.first_scored :])
        tokens += len(next_ids)
        exact = peers[0].log_probabilities(one.token_ids)[rows]
        for peer in peers:
            ours = exact if peer is peers[0] else peer.log_probabilities(one.token_ids)[rows]
            peer.loss -= ours[np.arange(len(next_ids)), next_ids].sum()
            peer.divergence += (np.exp(exact) * (exact - ours)).sum()
            peer.same_choice += (exact.argmax(-1) == ours.argmax(-1)).sum()
        if number % 16 == 15:
            print(f"{number + 1} of {len(windows)} windows", flush=True)
    for peer in peers:
        yield {
            "file": peer.file.name,
            "perplexity": math.exp(peer.loss / tokens),
            "kl_to_raw": peer.divergence / tokens,
            "same_choice": peer.same_choice / tokens,
            **sizes(peer.file),
        }


def sizes(file: Path) -> dict[str, object]:
    """True bytes of a file: of the experts' tensors, of all tensors, of the whole; and what types they have."""
    tensors = gguf.GGUFReader(file).tensors
    experts = [tensor for tensor in tensors if "_exps" in tensor.name]
    dense = [tensor for tensor in tensors if "_exps" not in tensor.name]
    expert_bytes = sum(int(tensor.n_bytes) for tensor in experts)
    dense_bytes = sum(int(tensor.n_bytes) for tensor in dense)
    return {
        "bits_per_weight": 8 * expert_bytes / sum(int(tensor.n_elements) for tensor in experts),
        "dense_bits": 8 * dense_bytes / sum(int(tensor.n_elements) for tensor in dense),
        "expert_bytes": expert_bytes,
        "dense_bytes": dense_bytes,
        "file_bytes": file.stat().st_size,
        "expert_types": sorted({tensor.tensor_type.name for tensor in experts}),
        "dense_types": sorted({tensor.tensor_type.name for tensor in dense}),
    }


def transformers_perplexity(checkpoint: Path, windows: list[Window]) -> float:
    """The same by transformers in fp32, with its plain attention and experts."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for one in windows:
            logits = model(torch.tensor([one.token_ids[:-1]])).logits[0].numpy()
            rows = log_softmax(logits)[one.first_scored - 1 :]
            next_ids = np.array(one.token_ids[one.first_scored :])
            loss -= float(rows[np.arange(len(next_ids)), next_ids].sum())
            tokens += len(next_ids)
    return math.exp(loss / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--model", default="tiny-qwen3moe-28m")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoint = locate_source(arguments.model)
    texts = [Text(path.name, path.read_text(encoding="utf-8")) for path in arguments.text]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    windows = cut_windows(tokenizer, texts, window=arguments.window, max_tokens=arguments.max_tokens)
    expected = transformers_perplexity(checkpoint, windows)
    reference = arguments.folder / "f32.gguf"
    files = [reference, *sorted(set(arguments.folder.glob("*.gguf")) - {reference})]
    results = list(measure(files, windows, arguments.window, arguments.threads))
    for one in results:
        print(
            f"{one['file']:20} perplexity {one['perplexity']:.4f}  KL {one['kl_to_raw']:.5f}  same choice "
            f"{one['same_choice']:.4f}  bits: experts {one['bits_per_weight']:.3f}, dense {one['dense_bits']:.3f}"
        )
    print(f"transformers in fp32: perplexity {expected:.4f}")
    whole = {
        "model": arguments.model,
        "texts": [text.name for text in texts],
        "window": arguments.window,
        "windows": len(windows),
        "tokens": sum(len(one.token_ids) - one.first_scored for one in windows),
        "transformers_perplexity": expected,
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(whole, indent=2) + "\n")
    difference = abs(results[0]["perplexity"] / expected - 1)  # type: ignore[operator]
    if difference > 1e-3:
        raise SystemExit(f"error: f32.gguf is {difference:.2%} away from transformers: the conversion is wrong")


if __name__ == "__main__":
    main()
