"""Embeddings of the tokens for each layer, next to those of the stream.

model / embed_tokens_per_layer / embedding        (vocab, layers * p): looked up, times sqrt(p)
model / per_layer_model_projection / kernel       (d, layers * p): of the embeddings of the stream
model / per_layer_projection_norm / scale         (p,)
model / layers / .. / per_layer_input_gate / kernel      (layers, d, p)
model / layers / .. / per_layer_projection / kernel      (layers, p, d)
model / layers / .. / post_per_layer_input_norm / scale  (layers, d)

    own = (lookup * sqrt(p) + norm(embeddings @ projection / sqrt(d))) / sqrt(2)
    x + norm(per_layer_projection(act(gate(x)) * own))            at the end of a layer

Shape letters: b batch, t time, d model, p features of a layer's own input.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import ACTIVATIONS, Embed, Linear, WideRMSNorm

RULES = (
    (r"model\.embed_tokens_per_layer\.embedding", P("tensor", "fsdp")),
    (r"model\.per_layer_model_projection\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.per_layer_input_gate\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.per_layer_projection\.kernel", P("tensor", "fsdp")),
    (r"model\.per_layer_projection_norm\.scale", P(None)),
)


def read_sizes(reader: ConfigReader, vocabulary: int) -> dict[str, Any]:
    """Read the sizes from config.json; a size of 0 turns the inputs off."""
    size = reader.integer("hidden_size_per_layer_input", 256, least=0)
    rows = reader.integer("vocab_size_per_layer_input", 262_144, least=0)
    if size and rows < vocabulary:
        reader.refuse(f"vocab_size_per_layer_input={rows} is below vocab_size={vocabulary}")
    return {"hidden_size_per_layer_input": size, "vocab_size_per_layer_input": rows}


def add_embeddings(decoder: Any, config: Any, rngs: nnx.Rngs) -> None:
    """Add the modules of all layers to a decoder."""
    p, d = config.hidden_size_per_layer_input, config.hidden_size
    features = config.num_hidden_layers * p
    decoder.embed_tokens_per_layer = Embed(config.vocab_size_per_layer_input, features, rngs=rngs)
    decoder.per_layer_model_projection = Linear(d, features, rngs=rngs)
    decoder.per_layer_projection_norm = WideRMSNorm(p, config.rms_norm_eps, rngs=rngs)


def own_inputs(decoder: Any, config: Any, tokens: jax.Array, embeddings: jax.Array) -> jax.Array:
    """Return the inputs (layers, b, t, p) of tokens (b, t) with embeddings (b, t, d)."""
    p, dtype = config.hidden_size_per_layer_input, embeddings.dtype
    shape = (*tokens.shape, config.num_hidden_layers, p)
    found = decoder.embed_tokens_per_layer(tokens).astype(dtype) * jnp.asarray(p**0.5, dtype)
    projected = decoder.per_layer_model_projection(embeddings) * config.hidden_size**-0.5
    projected = decoder.per_layer_projection_norm(projected.reshape(shape))
    return jnp.moveaxis((projected + found.reshape(shape)) * 2.0**-0.5, 2, 0)


def add_gate(layer: Any, config: Any, rngs: nnx.Rngs) -> None:
    """Add the modules of a layer to it."""
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    layer.per_layer_input_gate = Linear(d, p, rngs=rngs)
    layer.per_layer_projection = Linear(p, d, rngs=rngs)
    layer.post_per_layer_input_norm = WideRMSNorm(d, config.rms_norm_eps, rngs=rngs)


def mix(layer: Any, act: str, x: jax.Array, own: jax.Array) -> jax.Array:
    """Return x (b, t, d) with the layer's own input (b, t, p) mixed in."""
    gated = ACTIVATIONS[act](layer.per_layer_input_gate(x)) * own
    return x + layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
