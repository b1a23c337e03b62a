"""Routed experts of Mixtral, Qwen 3 MoE and gpt-oss.

model / layers / mlp / gate / kernel                     (layers, d, experts): the router
model / layers / mlp / experts / gate_up_proj / kernel   (layers, experts, d, 2 f)
model / layers / mlp / experts / down_proj / kernel      (layers, experts, f, d)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax import weights
from lora_jax.models import decoder
from lora_jax.models.common import Routing
from lora_jax.models.decoder import AttentionInputs, DecoderConfig
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.attention import KVContext
from lora_jax.nn.modules import ACTIVATIONS, Linear, RMSNorm
from lora_jax.sharding import whole_unless_split

RULES = (  # the first that matches counts, so those of experts stand before the dense ones
    (r"model\.layers\.(.*\.)?mlp\.gate\.kernel", P(None, None)),
    (r"model\.layers\.(.*\.)?mlp\.experts\.gate_up_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"model\.layers\.(.*\.)?mlp\.experts\.down_proj\.kernel", P(None, "tensor", "fsdp")),
    *decoder.RULES,
)


def note_router_loss(reader: ConfigReader) -> None:
    """Note that the load-balancing loss of the router is a setting of the run."""
    reader.inert("output_router_logits", "router_aux_loss_coef")
    if reader.content.get("output_router_logits"):
        reader.notes.append(
            "config.json: output_router_logits adds the router's loss to training in "
            "transformers; here train.router_aux_loss_coef does"
        )


def read_chosen(reader: ConfigReader, experts: int, default: int) -> int:
    """Read the number of experts per token."""
    chosen = reader.integer("num_experts_per_tok", default)
    if chosen > experts:
        reader.refuse(f"num_experts_per_tok={chosen} is above the number of experts, {experts}")
    return chosen


class ExpertLinear(nnx.Module):
    """y = x @ kernel[e] + bias[e] for the expert e of each row, with kernel (experts, in, out)."""

    def __init__(
        self,
        experts: int,
        features_in: int,
        features_out: int,
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(normal(rngs.params(), (experts, features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros((experts, features_out))) if use_bias else None

    def __call__(self, x: jax.Array, group_sizes: jax.Array, order: jax.Array) -> jax.Array:
        y = weights.expert_linear(x, self.kernel.get_value(), group_sizes, order)
        if self.bias is None:
            return y
        bias = self.bias.get_value().astype(y.dtype)
        return y + jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=len(x))


class Experts(nnx.Module):
    """Gated MLPs. A family that joins gate and up in another way overrides `gated`."""

    def __init__(
        self, experts: int, d: int, f: int, act: str, *, use_bias: bool = False, rngs: nnx.Rngs
    ):
        self.gate_up_proj = ExpertLinear(experts, d, 2 * f, use_bias=use_bias, rngs=rngs)
        self.down_proj = ExpertLinear(experts, f, d, use_bias=use_bias, rngs=rngs)
        self.count, self.act = experts, act

    def gated(self, gate_up: jax.Array) -> jax.Array:
        """Return act(gate) * up (rows, f) of both projections (rows, 2 f)."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return ACTIVATIONS[self.act](gate) * up

    def __call__(self, x: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        """Apply the experts `chosen` (rows, k) to x (rows, d); sum the results times `shares`."""
        rows, k = chosen.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count).astype(jnp.int32)
        gate_up = self.gate_up_proj(x[order // k], sizes, order)
        y = self.down_proj(self.gated(gate_up), sizes, order)
        y = y[jnp.argsort(order)].reshape(rows, k, -1)
        return jnp.einsum("rkd,rk->rd", y, shares.astype(y.dtype))


class SparseMLP(nnx.Module):
    """Mixture of experts: each token uses the `chosen` experts of highest probability (arXiv
    2401.04088). With `normalize` their shares add up to 1. A family with another router overrides
    `scores`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        f: int,
        *,
        experts: int,
        chosen: int,
        normalize: bool,
        rngs: nnx.Rngs,
    ):
        self.gate = Linear(config.hidden_size, experts, rngs=rngs)
        self.experts = Experts(experts, config.hidden_size, f, config.hidden_act, rngs=rngs)
        self.chosen, self.normalize = chosen, normalize

    def scores(self, x: jax.Array) -> jax.Array:
        """Return the router's logits (b, t, experts) of x (b, t, d)."""
        return self.gate(x)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Routing]:
        rows = whole_unless_split(x).reshape(-1, x.shape[-1])
        scores = self.scores(x).reshape(len(rows), -1).astype(jnp.float32)
        probabilities = jax.nn.softmax(scores, axis=-1)
        shares, chosen = jax.lax.top_k(probabilities, self.chosen)
        if self.normalize:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        y = self.experts(rows, chosen, shares)
        counted = real.reshape(-1, 1).astype(jnp.float32)
        load = jax.nn.one_hot(chosen, probabilities.shape[-1]).sum(axis=1)
        routing = Routing((load * counted).sum(0), (probabilities * counted).sum(0), counted.sum())
        return y.reshape(x.shape), routing


class Block(nnx.Module):
    """A layer with norms before attention and experts."""

    def __init__(
        self,
        config: DecoderConfig,
        attention: Any,
        mlp: SparseMLP,
        norm: Callable = RMSNorm,
        *,
        rngs: nnx.Rngs,
    ):
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = attention
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Routing]:
        y, cached = self.self_attn(self.input_layernorm(x), inputs, kv)
        x = x + y
        y, routing = self.mlp(self.post_attention_layernorm(x), inputs.real)
        return x + y, cached, routing
