"""Write a random bf16 checkpoint with the shape of a published model, shard by shard, for tools that need one.

    python benchmarks/random_checkpoint.py olmoe-1b-7b FOLDER [--layers N] [--config-only]

With `--config-only`, what `moestro pack --random FOLDER STORE` needs: a store of moestro needs no checkpoint.

Random weights route almost uniformly, which is the worst case for every cache. The tokenizer is the built-in model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from moestro.hf.skeleton import build_skeleton
from moestro.store.locate import locate_source

SHAPES: dict[str, PreTrainedConfig] = {
    "olmoe-1b-7b": OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        eos_token_id=0,
        dtype="bfloat16",
    ),
    "gpt-oss-20b": GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=131072,
        eos_token_id=200002,
        dtype="bfloat16",
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        eos_token_id=0,
        dtype="bfloat16",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the published model has")
    parser.add_argument("--config-only", action="store_true")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    if arguments.config_only:
        config.save_pretrained(arguments.folder)
    else:
        write(config, arguments.folder)


def write(config: PreTrainedConfig, folder: Path) -> None:
    """Write the checkpoint's shards, one per MoE layer and one for the dense weights, then config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    skeleton = build_skeleton(config)
    index: dict[str, str] = {}
    dense = {name: _random(shape) for name, (shape, _) in skeleton.dense.items()}
    # Tokens must outweigh what random layers add to them, or every token is routed alike.
    dense["model.embed_tokens.weight"] *= config.hidden_size**0.5
    _save(dense, folder / "model-dense.safetensors", index)
    for layer in skeleton.expert_layers:
        tensors: dict[str, torch.Tensor] = {}
        for expert in range(layer.num_experts):
            for param in layer.params:
                values = _random(param.shape)
                parts = values.chunk(2) if param.name == "gate_up_proj" else (values,)
                names = ("gate_proj", "up_proj") if param.name == "gate_up_proj" else (param.name,)
                for name, part in zip(names, parts, strict=True):
                    tensors[f"{layer.module}.{expert}.{name}.weight"] = part.contiguous()
        _save(tensors, folder / f"model-layer-{layer.layer:03}.safetensors", index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = [type(skeleton.model).__name__]
    config.save_pretrained(folder)
    tokenizer = locate_source("tiny-qwen3moe-28m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape) / (shape[-1] ** 0.5)
    if len(shape) == 1:
        values = torch.ones(shape)
    return values.to(torch.bfloat16)


def _save(tensors: dict[str, torch.Tensor], path: Path, index: dict[str, str]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    index.update(dict.fromkeys(tensors, path.name))


if __name__ == "__main__":
    main()
