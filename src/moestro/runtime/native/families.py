"""Which models the native path knows, and what it makes of them.

A family is described by the modules that transformers builds for it. Whatever is not exactly as described (another
class, another child, an activation or an attention pattern that is not known) makes the model one for the general path.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from moestro._native import Routing
from moestro.hf.skeleton import Skeleton
from moestro.runtime.native.blueprint import AttentionParts, Blueprint, LayerParts, MlpParts
from moestro.runtime.probe import LayerAttention, Probe

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class _UnknownError(Exception):
    """The model has something that the description does not."""


@dataclass(frozen=True)
class Family:
    """How a family differs from the others: names of its classes and modules, and what its router does.

    `qk_norm` says that queries and keys are normed, `sinks` that attention has a logit without a value, `dense_layers`
    that layers may have an ordinary MLP, `shared` that every MoE layer has a shared expert behind a gate.
    """

    prefix: str
    routing: Callable[[Any], Routing]
    block: str = "SparseMoeBlock"
    router: str = "gate"
    qk_norm: bool = False
    sinks: bool = False
    router_bias: bool = False
    dense_layers: bool = False
    shared: bool = False
    clip: Callable[[Any], float] = lambda _: math.inf


def _by_attribute(router: Any) -> Routing:
    return Routing.SOFTMAX_THEN_PICK_AND_SCALE if router.norm_topk_prob else Routing.SOFTMAX_THEN_PICK


def _clip_qkv(config: Any) -> float:
    return math.inf if config.clip_qkv is None else float(config.clip_qkv)


FAMILIES: dict[str, Family] = {
    "gpt_oss": Family(
        prefix="GptOss",
        routing=lambda _: Routing.PICK_THEN_SOFTMAX,
        block="MLP",
        router="router",
        sinks=True,
        router_bias=True,
    ),
    "mixtral": Family(prefix="Mixtral", routing=lambda _: Routing.SOFTMAX_THEN_PICK_AND_SCALE),
    "olmoe": Family(prefix="Olmoe", routing=_by_attribute, qk_norm=True, clip=_clip_qkv),
    "qwen2_moe": Family(prefix="Qwen2Moe", routing=_by_attribute, dense_layers=True, shared=True),
    "qwen3_moe": Family(prefix="Qwen3Moe", routing=_by_attribute, qk_norm=True, dense_layers=True),
}
"""By `model_type`."""


def describe(skeleton: Skeleton, probed: Probe) -> Blueprint | None:
    """What `skeleton` consists of, or None for a model that is to run on the general path."""
    family = FAMILIES.get(skeleton.config.model_type)
    if family is None:
        return None
    try:
        return _Reader(family, skeleton, probed).model()
    except _UnknownError as difference:
        logging.getLogger("moestro").info("This model runs on the general path: %s.", difference)
        return None


class _Reader:
    def __init__(self, family: Family, skeleton: Skeleton, probed: Probe) -> None:
        self.family, self.skeleton, self.probed = family, skeleton, probed
        self.hidden = int(skeleton.config.hidden_size)

    def model(self) -> Blueprint:
        causal: Any = self.skeleton.model
        self._expect(causal, "ForCausalLM", {"model", "lm_head"})
        body = causal.model
        self._expect(body, "Model", {"embed_tokens", "layers", "norm", "rotary_emb"})
        layers = tuple(self._layer(index, layer) for index, layer in enumerate(body.layers))
        _check(
            len(layers) == len(self.probed.kv_layers) == self.skeleton.config.num_hidden_layers, "layers are skipped"
        )
        _check(len(set(self.probed.experts_per_token)) == 1, "layers differ in the number of experts per token")
        self._expect(body.rotary_emb, "RotaryEmbedding", set())
        head_dim = layers[0].attention.head_dim
        _check(all(layer.attention.head_dim == head_dim for layer in layers), "heads differ in width")
        _check(2 * body.rotary_emb.inv_freq.numel() == head_dim, "a part of each head is not rotated")
        _check(type(body.embed_tokens) is nn.Embedding, "the embedding is of another class")
        return Blueprint(
            embedding=body.embed_tokens,
            rotary=body.rotary_emb,
            layers=layers,
            norm=self._norm(body.norm),
            head=_linear(causal.lm_head),
            hidden=self.hidden,
            experts_per_token=self.probed.experts_per_token[0],
        )

    def _layer(self, index: int, layer: Any) -> LayerParts:
        self._expect(layer, "DecoderLayer", {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        block, router, experts = layer.mlp, None, None
        mlp: MlpParts | None
        if self.family.dense_layers and type(block).__name__ == f"{self.family.prefix}MLP":
            mlp = self._mlp(block)
        else:
            shared = {"shared_expert", "shared_expert_gate"} if self.family.shared else set()
            self._expect(block, self.family.block, {self.family.router, "experts"} | shared)
            router, experts = getattr(block, self.family.router), block.experts
            bias = {"bias"} if self.family.router_bias else set()
            self._expect(router, "TopKRouter", set(), {"weight"} | bias)
            _check(router.top_k == self.probed.experts_per_token[0], "the router picks another number of experts")
            mlp = self._mlp(block.shared_expert, _linear(block.shared_expert_gate)) if shared else None
        return LayerParts(
            input_norm=self._norm(layer.input_layernorm),
            attention=self._attention(index, layer.self_attn),
            post_norm=self._norm(layer.post_attention_layernorm),
            mlp=mlp,
            router=router,
            routing=Routing.SOFTMAX_THEN_PICK if router is None else self.family.routing(router),
            experts=experts,
        )

    def _attention(self, index: int, attention: Any) -> AttentionParts:
        family, config = self.family, self.skeleton.config
        norms = {"q_norm", "k_norm"} if family.qk_norm else set()
        projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
        self._expect(attention, "Attention", projections | norms, {"sinks"} if family.sinks else set())
        _check(attention.layer_idx == index, "layers are numbered otherwise")
        cached, seen = self.probed.kv_layers[index], self.probed.attention[index]
        heads, dim = int(config.num_attention_heads), int(attention.head_dim)
        _check(cached.heads == cached.value_heads == config.num_key_value_heads, "another number of heads is cached")
        _check(cached.key_width == cached.value_width == dim and dim % 2 == 0, "keys or values have another width")
        _check(not cached.gathered, "keys are not cached as they are used")
        _check(seen.sinks == family.sinks, "attention sinks are not where they are expected")
        return AttentionParts(
            q=_linear(attention.q_proj),
            k=_linear(attention.k_proj),
            v=_linear(attention.v_proj),
            o=_linear(attention.o_proj),
            q_norm=self._norm(attention.q_norm, (dim, heads * dim)) if norms else None,
            k_norm=self._norm(attention.k_norm, (dim, cached.heads * dim)) if norms else None,
            clip=family.clip(config),
            heads=heads,
            heads_kv=cached.heads,
            head_dim=dim,
            sinks_owner=attention if family.sinks else None,
            **_call_of(seen),
        )

    def _norm(self, norm: Any, widths: tuple[int, ...] = ()) -> nn.Module:
        self._expect(norm, "RMSNorm", set(), {"weight"})
        _check(norm.weight.numel() in (widths or (self.hidden,)), "a norm has another width")
        return norm  # type: ignore[no-any-return]

    def _mlp(self, mlp: Any, scale: nn.Linear | None = None) -> MlpParts:
        self._expect(mlp, "MLP", {"gate_proj", "up_proj", "down_proj", "act_fn"})
        _check(isinstance(mlp.act_fn, _SILU), f"an MLP has the activation {type(mlp.act_fn).__name__}")
        return MlpParts(_linear(mlp.gate_proj), _linear(mlp.up_proj), _linear(mlp.down_proj), scale)

    def _expect(self, module: nn.Module, kind: str, children: set[str], parameters: set[str] | None = None) -> None:
        """The module is transformers' own class of that name, with exactly these children and parameters of its own."""
        name = type(module).__name__
        _check(
            name == self.family.prefix + kind and type(module).__module__.startswith("transformers."),
            f"it has a {name}",
        )
        _check({child for child, _ in module.named_children()} == children, f"its {name} has other parts")
        own = {parameter for parameter, _ in module.named_parameters(recurse=False)}
        _check(own == (parameters or set()), f"its {name} has other parameters")


def _linear(module: Any) -> nn.Linear:
    _check(type(module) is nn.Linear, f"it has a {type(module).__name__} in place of a linear map")
    return module  # type: ignore[no-any-return]


def _call_of(seen: LayerAttention) -> dict[str, Any]:
    return {"scale": seen.scale, "window": seen.window, "softcap": seen.softcap}


def _check(good: bool, difference: str) -> None:
    if not good:
        raise _UnknownError(difference)
