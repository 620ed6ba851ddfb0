"""A model's skeleton: built by transformers from its config alone, with no weights in memory.

From the skeleton come the expert layers (which packing splits and the runtime hooks), the dense tensors (which are
placed once), and the refusals of what moestro does not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moestro.errors import CheckpointError, UnsupportedModelError
from moestro.hf.bridge import ALL_EXPERTS_FUNCTIONS

READABLE_QUANTISATION = ("mxfp4", "fp8")
"""Quantised checkpoints that packing can dequantise, by `quantization_config.quant_method`."""

_EXPERTS_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class ExpertParam:
    """One parameter of one expert in canonical layout: matrices are [out, in], biases [out].

    `transposed` says that the model's own parameter holds [in, out], so that packing has to transpose it.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer. `layer` counts MoE layers only; `module` is the experts module's full name."""

    layer: int
    module: str
    num_experts: int
    params: tuple[ExpertParam, ...]


@dataclass
class Skeleton:
    """A model whose parameters are on the meta device; its small computed buffers (rotary frequencies) are real.

    `dense` maps the name of every tensor that is not an expert's to its shape and dtype in the fp32-built model, tied
    duplicates left out.
    """

    config: PreTrainedConfig
    model: PreTrainedModel
    expert_layers: tuple[ExpertLayer, ...]
    dense: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def total_experts(self) -> int:
        return sum(layer.num_experts for layer in self.expert_layers)


def load_config(folder: Path) -> PreTrainedConfig:
    """Read a checkpoint folder's `config.json`.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        UnsupportedModelError: transformers does not know the architecture.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json. Expected a Hugging Face model folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object. Expected a Hugging Face model config.")
    return config_from_dict(raw)


def config_from_dict(raw: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config that a `config.json` describes (never runs code that came with the model).

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
        CheckpointError: a field has a value that the architecture does not take.
    """
    values = dict(raw)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            "The model's config.json names no model_type. Expected the config of a mixture-of-experts language model."
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise CheckpointError(f"The config of this {model_type} model is not valid: {error}") from error
        hint = " It comes with code of its own, which moestro never runs." if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"The architecture {model_type!r} is unknown to the installed transformers.{hint} "
            "Expected a mixture-of-experts language model that transformers implements; a newer moestro may know it."
        ) from error
    except (TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"The config of this {model_type} model is not valid: {error}") from error


def build_skeleton(config: PreTrainedConfig) -> Skeleton:
    """Build the model without weights and find its experts.

    Raises:
        UnsupportedModelError: the model is not a decoder-only mixture of experts that transformers routes through its
            experts interface, or is quantised in a way that packing cannot read.
    """
    _refuse_by_config(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for output in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if hasattr(config, output):
            setattr(config, output, False)  # for training and study; they would be computed and thrown away
    model = _build_on_meta(config)
    _materialise_computed_buffers(model)
    layers = tuple(_expert_layers(model))
    if not layers:
        raise UnsupportedModelError(_no_experts_message(config))
    return Skeleton(config=config, model=model, expert_layers=layers, dense=_dense_tensors(model, layers))


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers dispatches this module through its experts interface."""
    return all(hasattr(module, name) for name in (*_EXPERTS_ATTRIBUTES, "num_experts"))


def _refuse_by_config(config: PreTrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model. Expected a decoder-only mixture-of-experts language model."
        )
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise UnsupportedModelError(f"{kind} reads more than text. Expected a text-only mixture of experts.")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"transformers has no language model (ForCausalLM) for {kind!r}.")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    if method not in READABLE_QUANTISATION:
        raise UnsupportedModelError(
            f"This checkpoint is quantised with {method!r}, which moestro cannot read. "
            f"Expected bf16, fp16 or fp32 weights, or one of: {', '.join(READABLE_QUANTISATION)}."
        )


def _build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build a {config.model_type} model from this config: {error}. "
            "Expected the config of a model that the installed transformers runs."
        ) from error
    model.eval()
    return model


def _materialise_computed_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds (rotary frequencies) their values, as transformers does after loading."""
    owners: set[str] = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        placeholder = torch.zeros_like(buffer, device="cpu")
        if placeholder.is_floating_point():
            placeholder.fill_(float("nan"))
        model.get_submodule(owner).register_buffer(leaf, placeholder, persistent=False)
        owners.add(owner)
    for owner in sorted(owners):
        model._init_weights(model.get_submodule(owner))
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UnsupportedModelError(
                f"{model.config.model_type} keeps a computed tensor ({name}) that transformers does not initialise."
            )


def _expert_layers(model: PreTrainedModel) -> Iterator[ExpertLayer]:
    layer = 0
    for name, module in model.named_modules():
        if not is_experts_module(module):
            continue
        if module.has_post_expert_norm:
            raise UnsupportedModelError(
                f"{model.config.model_type} normalises each expert's output, which moestro does not do yet."
            )
        params = tuple(
            _expert_param(param_name, param, bool(module.is_transposed))
            for param_name, param in module.named_parameters(recurse=False)
        )
        yield ExpertLayer(layer=layer, module=name, num_experts=int(module.num_experts), params=params)
        layer += 1


def _expert_param(name: str, param: torch.Tensor, transposed: bool) -> ExpertParam:
    shape = tuple(param.shape[1:])
    is_matrix = len(shape) == 2
    canonical = shape[::-1] if transposed and is_matrix else shape
    return ExpertParam(name=name, shape=canonical, transposed=transposed and is_matrix)


def _dense_tensors(
    model: PreTrainedModel, layers: tuple[ExpertLayer, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    expert_names = {f"{layer.module}.{param.name}" for layer in layers for param in layer.params}
    dense: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in expert_names or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        dense[name] = (tuple(tensor.shape), tensor.dtype)
    return dense


def _no_experts_message(config: PreTrainedConfig) -> str:
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
    if any(getattr(config, field, None) for field in fields):
        return (
            f"transformers does not route the experts of {config.model_type!r} through its experts interface "
            f"({type(ALL_EXPERTS_FUNCTIONS).__name__}), so moestro cannot take them over."
        )
    return (
        f"{config.model_type!r} is not a mixture-of-experts model: it has no routed experts to keep on disk. "
        "Expected, for example, a Qwen3-MoE, Mixtral, OLMoE, DeepSeek or gpt-oss model."
    )
