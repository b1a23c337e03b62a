"""GPT-2: learned positions, layer norms, fused queries, keys and values, `model_type` gpt2.

transformer / {wte,wpe} / embedding             (vocab, d), (n_positions, d)
transformer / h / attn / {c_attn,c_proj} / kernel    (layers, d, 3 d), (layers, d, d)
transformer / h / mlp / {c_fc,c_proj} / kernel       (layers, d, f), (layers, f, d)
transformer / h / {ln_1,ln_2}, ln_f / {scale,bias}

Its files store kernels (in, out), without a transposition. Dropout that configs ask for in training
is left out.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models.common import PLAIN, Execution, Names, scan_layers
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.attention import KVContext, attend, mask_specs
from lora_jax.nn.cache import Cache
from lora_jax.nn.modules import ACTIVATIONS, Embed, LayerNorm, Linear
from lora_jax.nn.texts import Texts
from lora_jax.nn.virtual import Virtual, by_layer, first_position, put_in
from lora_jax.shared_input import share

RULES = (
    (r"transformer\.wte\.embedding", P("tensor", "fsdp")),
    (r"transformer\.wpe\.embedding", P(None, "fsdp")),
    (r"transformer\.h\..*\.(c_attn|c_fc)\.kernel", P("fsdp", "tensor")),
    (r"transformer\.h\..*\.(c_attn|c_fc)\.bias", P("tensor")),
    (r"transformer\.h\..*\.c_proj\.kernel", P("tensor", "fsdp")),
    (r"transformer\.h\..*\.c_proj\.bias", P(None)),
    (r"transformer\.(h\.)?ln_\w+\.(scale|bias)", P(None)),
    (r"lm_head\.kernel", P("fsdp", "tensor")),
)
NAMES = Names(base="transformer.", no_weights=r".*\.attn\.(masked_)?bias")

# Other names of the fields that transformers accepts.
_ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


@dataclass(frozen=True)
class Config:
    """Fields of a Hugging Face config that affect results, by their names in other families."""

    vocab_size: int
    hidden_size: int  # n_embd
    intermediate_size: int  # n_inner
    num_hidden_layers: int  # n_layer
    num_attention_heads: int  # n_head
    max_position_embeddings: int  # n_positions
    layer_norm_epsilon: float
    activation_function: str
    tie_word_embeddings: bool
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def learned_positions(self) -> int:
        """The most tokens that a text can have."""
        return self.max_position_embeddings


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.inert("n_ctx", "reorder_and_upcast_attn", "predict_special_tokens")
    reader.inert("summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj")
    reader.only("add_cross_attention", False, None)
    for other, name in _ALIASES.items():
        reader.alias(other, name)
    hidden, heads = reader.size("n_embd", 768), reader.size("n_head", 12)
    if hidden % heads:
        reader.refuse(f"n_embd={hidden} is not a multiple of n_head={heads}")
    return Config(
        vocab_size=reader.size("vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=reader.optional_integer("n_inner", None) or 4 * hidden,
        num_hidden_layers=reader.size("n_layer", 12),
        num_attention_heads=heads,
        max_position_embeddings=reader.size("n_positions", 1024),
        layer_norm_epsilon=reader.number("layer_norm_epsilon", 1e-5, least=0),
        activation_function=reader.choice("activation_function", "gelu_new", ACTIVATIONS),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        scale_attn_weights=reader.boolean("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=reader.boolean("scale_attn_by_inverse_layer_idx", False),
    )


class Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.c_attn = Linear(d, 3 * d, use_bias=True, rngs=rngs)
        self.c_proj = Linear(d, d, use_bias=True, rngs=rngs)
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0

    def __call__(self, x, masks, kv, divisor):
        """Return the output (b, t, d) for x (b, t, d), with scores divided by `divisor`, and the
        cache with the new tokens.
        """
        parts = jnp.split(self.c_attn(share(x)), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        mixed, cached = attend(q / divisor.astype(q.dtype), new, kv, masks, self.scale)
        return self.c_proj(mixed.reshape(x.shape)), cached


class MLP(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.c_fc = Linear(d, f, use_bias=True, rngs=rngs)
        self.c_proj = Linear(f, d, use_bias=True, rngs=rngs)
        self.act = config.activation_function

    def __call__(self, x):
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(share(x))))


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(d, epsilon, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = LayerNorm(d, epsilon, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, masks, kv, divisor):
        y, cached = self.attn(self.ln_1(x), masks, kv, divisor)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cached


class Decoder(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.wte = Embed(config.vocab_size, d, rngs=rngs)
        self.wpe = Embed(config.max_position_embeddings, d, rngs=rngs)
        self.h = nnx.vmap(lambda own: Block(config, rngs=own))(rngs.split(config.num_hidden_layers))
        self.ln_f = LayerNorm(d, config.layer_norm_epsilon, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.transformer = Decoder(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Return embeddings (b, t, d) of tokens (b, t), without positions."""
        return self.transformer.wte(tokens).astype(dtype)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        seen_until: jax.Array | None = None,
        cache: Cache | None = None,
        prefix: Virtual | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[jax.Array, Cache | None]:
        """Return final hidden states (b, t, d) of tokens (b, t), and the cache with the tokens
        written, if one is given. With a `Prompt`, each text of the batch must begin with
        placeholders for it. `seen_until` (b, t) is that of `Texts`.
        """
        config, own = self.config, by_layer(prefix)
        x, in_text = put_in(self.embed(tokens, jnp.float32), positions, prefix), positions
        positions = positions + first_position(prefix)
        prefix_masks = [own.visible(positions, None)] if own else []
        texts = Texts(in_text, segment_ids, seen_until)
        (masks,) = mask_specs(execution.kernel, texts, cache, prefix_masks=prefix_masks)
        placed = None if cache is None else (cache, cache.places(in_text, segment_ids))
        divisors = jnp.ones(config.num_hidden_layers)
        if config.scale_attn_by_inverse_layer_idx:
            divisors = jnp.arange(1.0, config.num_hidden_layers + 1)

        def block(x, layer, each, cached):
            prefix, divisor = each
            x, cached = layer(x, masks, KVContext(cached, prefix), divisor)
            return x, None, cached

        x = (x + self.transformer.wpe(positions)).astype(execution.dtype)
        x, _, cache = scan_layers(
            block, self.transformer.h, x, (own, divisors), execution.remat, placed
        )
        return self.transformer.ln_f(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits (..., vocab) of hidden states (..., d), in their dtype."""
        return (
            self.transformer.wte.attend(hidden)
            if self.config.tie_word_embeddings
            else self.lm_head(hidden)
        )
