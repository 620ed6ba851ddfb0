"""Write a Qwen3-MoE checkpoint (the built-in model unless another is named) as GGUF files for llama.cpp.

    python benchmarks/peers/gguf_qwen3moe.py FOLDER [--model CHECKPOINT] [--bin LLAMA_CPP/bin] [--recipes q8_0,q4_0]
        [--calibrate FILE]

Writes FOLDER/f32.gguf, the exact values, and with `--bin` one quantised file for each recipe, made by llama-quantize.
Needs `pip install gguf`. Recipes: a type of llama-quantize (q4_0, q5_0, q8_0, q4_k_m, q3_k_m, q2_k: as users run it, so
the tied head and some tensors get more bits), or `experts-TYPE`: TYPE for the experts and Q8_0 for all the rest. A
K-quant needs rows of a multiple of 256 values; llama-quantize takes another type for tensors that have not. With
`--calibrate` a recipe may end in `-imatrix`: llama-imatrix first measures on that text which inputs matter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from moestro.store.locate import locate_source

PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_PARTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
RECIPES = "q8_0,q5_0,q4_0,experts-q8_0,experts-q5_0,experts-q4_0,q4_k_m,q3_k_m,q2_k"
CALIBRATED = "experts-q5_0-imatrix,experts-q4_0-imatrix,q4_k_m-imatrix,q3_k_m-imatrix,q2_k-imatrix"


def write_f32(checkpoint: Path, file: Path) -> None:
    """The checkpoint's values as they are, in fp32; experts of a layer are one tensor, as llama.cpp wants them."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen3moe")
    _add_config(writer, config)
    _add_tokenizer(writer, checkpoint, config)
    with _Weights(checkpoint) as weights:
        writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
        writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
        if not config["tie_word_embeddings"]:
            writer.add_tensor("output.weight", weights["lm_head.weight"])
        for layer in range(config["num_hidden_layers"]):
            source, target = f"model.layers.{layer}", f"blk.{layer}"
            for theirs, ours in PARTS.items():
                writer.add_tensor(f"{target}.{ours}.weight", weights[f"{source}.{theirs}.weight"])
            for theirs, ours in EXPERT_PARTS.items():
                names = [f"{source}.mlp.experts.{index}.{theirs}.weight" for index in range(_experts(config))]
                writer.add_tensor(f"{target}.{ours}.weight", np.stack([weights[name] for name in names]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _experts(config: dict) -> int:
    return config.get("num_experts") or config["num_local_experts"]


def _add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_name("qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict) -> None:
    """A byte-level BPE whose pre-tokenizer is GPT-2's; no special token is put before a text."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    special = {one["id"] for one in tokenizer["added_tokens"]}
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    assert len(tokens) == config["vocab_size"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens))]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


class _Weights:
    """A checkpoint's tensors by name, as fp32 arrays."""

    def __init__(self, checkpoint: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(checkpoint.glob("*.safetensors"))]
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._home.clear()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._home[name].get_tensor(name).to(torch.float32).numpy()


def quantise(source: Path, recipe: str, tools: Path, target: Path, importance: Path) -> None:
    """Make `target` from the fp32 file with llama-quantize."""
    command: list[str | Path] = [tools / "llama-quantize"]
    plain = recipe.removesuffix("-imatrix")
    if plain != recipe:
        command += ["--imatrix", importance]
    kind = plain.removeprefix("experts-")
    if kind != plain:
        command += ["--tensor-type", f"_exps={kind}", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
        kind = "q8_0"
    subprocess.run(
        [*command, source, target, kind, "2"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def measure_importance(source: Path, text: Path, tools: Path, target: Path) -> None:
    """Which inputs of each matrix matter, by llama-imatrix, in windows of 256 tokens."""
    command: list[str | Path] = [tools / "llama-imatrix", "-m", source, "-f", text, "-o", target]
    command += ["-c", "256", "-b", "256", "-t", "2", "--no-ppl"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny-qwen3moe-28m", help="checkpoint folder, hub id or built-in model")
    parser.add_argument("--bin", type=Path, help="folder with llama-quantize, for the quantised files")
    parser.add_argument("--calibrate", type=Path, help="text for recipes that end in -imatrix")
    parser.add_argument("--recipes", help=f"default: {RECIPES}; with --calibrate also {CALIBRATED}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    exact = arguments.folder / "f32.gguf"
    write_f32(locate_source(arguments.model), exact)
    if not arguments.bin:
        return
    recipes = arguments.recipes or ",".join([RECIPES, CALIBRATED] if arguments.calibrate else [RECIPES])
    importance = arguments.folder / "importance.dat"
    if arguments.calibrate:
        measure_importance(exact, arguments.calibrate, arguments.bin, importance)
    for recipe in recipes.split(","):
        quantise(exact, recipe, arguments.bin, arguments.folder / f"{recipe}.gguf", importance)


if __name__ == "__main__":
    main()
