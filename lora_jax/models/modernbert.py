"""ModernBERT with a sequence-classification head, `model_type` modernbert.

model / embeddings / tok_embeddings / embedding, norm / scale         (vocab, d), (d,)
model / layers / N / {attn_norm,mlp_norm} / scale                     layer 0 has no attn_norm
model / layers / N / attn / {Wqkv,Wo} / kernel                        (d, 3 d), (d, d)
model / layers / N / mlp / {Wi,Wo} / kernel                           (d, 2 f), (f, d)
model / final_norm, head / {dense,norm}, classifier

Layers of two shapes are a list, not a stack.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import bert, decoder, phi3
from lora_jax.models.common import Execution, Names, run_layers
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import SLIDING, ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.attention import KVContext
from lora_jax.nn.modules import ACTIVATIONS, Embed, LayerNorm, Linear, PlainLayerNorm
from lora_jax.nn.rope import rope
from lora_jax.nn.texts import Texts

RULES = (
    (r"model\.embeddings\.tok_embeddings\.embedding", P("tensor", "fsdp")),
    (r".*\.(Wqkv|Wi)\.kernel", P("fsdp", "tensor")),
    (r".*\.(Wqkv|Wi)\.bias", P("tensor")),
    (r".*\.Wo\.kernel", P("tensor", "fsdp")),
    (r".*\.Wo\.bias|.*norm\.(scale|bias)", P(None)),
    (r"(head\.dense|classifier)\.(kernel|bias)", P(None)),
)
ARCHITECTURE = "ModernBertForSequenceClassification"
NAMES = Names(no_weights=r"decoder\.(weight|bias)", heads=("classifier", "head"))
_ROPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length


@dataclass(frozen=True)
class Config(DecoderConfig):
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    classifier_activation: str
    classifier_pooling: str
    labels: tuple[str, ...]


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    bert.check_encoder(reader)
    reader.inert("decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "layer_norm_eps")
    reader.inert("deterministic_flash_attn", "initializer_cutoff_factor", "reference_compile")
    for name in ("sliding_window", "head_dim", "num_key_value_heads", "rope_theta", "rope_scaling"):
        reader.only(name, None, why="it is not a field of this family in transformers")
    reader.alias("global_rope_theta", "rope_theta")
    every = reader.integer("global_attn_every_n_layers", 3)
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(50_368, 768, 1152, 22, 12),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            epsilon="norm_eps",
            hidden_act=("hidden_activation", "gelu"),
        ),
        sliding_window=reader.integer("local_attention", 128) // 2 + 1,  # on either side
        slides=lambda layer: layer % every > 0,
        rope_rules=RopeRules(160_000.0, local=("local_rope_theta", 10_000.0), types=_ROPES),
    )
    sizes = {name: fields[name] for name in ("hidden_size", "num_attention_heads")}
    bert.check_heads(reader, **sizes)
    biases = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
    flags: dict[str, Any] = {name: reader.boolean(name, False) for name in biases}
    return Config(
        **fields | {"tie_word_embeddings": False},
        **flags,
        classifier_activation=reader.choice("classifier_activation", "gelu", ACTIVATIONS),
        classifier_pooling=reader.choice("classifier_pooling", "cls", {"cls": 0, "mean": 1}),
        labels=reader.labels(),
    )


def norm(config: Config, *, rngs: nnx.Rngs) -> LayerNorm:
    """Return a layer norm, with a bias or without."""
    kind = LayerNorm if config.norm_bias else PlainLayerNorm
    return kind(config.hidden_size, config.rms_norm_eps, rngs=rngs)


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        d, bias = config.hidden_size, config.attention_bias
        del self.q_proj, self.k_proj, self.v_proj, self.o_proj
        self.Wqkv = Linear(d, 3 * d, use_bias=bias, rngs=rngs)
        self.Wo = Linear(d, d, use_bias=bias, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = jnp.split(self.Wqkv(x), 3, axis=-1)
        return self.heads(q), self.heads(k), self.heads(v)

    def output(self, mixed: jax.Array, *rest: jax.Array) -> jax.Array:
        return self.Wo(mixed)


class Block(nnx.Module):
    def __init__(self, config: Config, index: int, *, rngs: nnx.Rngs):
        if index > 0:
            self.attn_norm = norm(config, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = norm(config, rngs=rngs)
        self.mlp = phi3.MLP(config, ("Wi", "Wo"), use_bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        normed = self.attn_norm(x) if hasattr(self, "attn_norm") else x
        x = x + self.attn(normed, inputs, KVContext())[0]
        return x + self.mlp(self.mlp_norm(x))


class Embeddings(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.tok_embeddings = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.norm = norm(config, rngs=rngs)


class Encoder(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List(
            Block(config, index, rngs=rngs) for index in range(config.num_hidden_layers)
        )
        self.final_norm = norm(config, rngs=rngs)


class Head(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, use_bias=config.classifier_bias, rngs=rngs)
        self.norm = norm(config, rngs=rngs)
        self.act = config.classifier_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(ACTIVATIONS[self.act](self.dense(x)))


class Model(bert.Classifier):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = Encoder(config, rngs=rngs)
        self.head = Head(config, rngs=rngs)
        self.classifier = Linear(config.hidden_size, len(config.labels), use_bias=True, rngs=rngs)

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        config, embeddings = self.config, self.model.embeddings  # there are no token types
        inputs = {
            kind: AttentionInputs(
                rope(texts.positions, config.head_dim, config.rope_parameters[kind]),
                bert.masks(texts, execution, config.sliding_window if kind == SLIDING else None),
                texts.segment_ids != 0,
                texts.positions,
                texts,
            )
            for kind in {*config.layer_types}
        }

        def block(x: jax.Array, layer: Block, index: int) -> jax.Array:
            return layer(x, inputs[config.layer_types[index]])

        x = embeddings.norm(embeddings.tok_embeddings(tokens)).astype(execution.dtype)
        return self.model.final_norm(run_layers(block, self.model.layers, x, execution.remat))

    def pool(self, x: jax.Array, texts: Texts) -> jax.Array:
        if self.config.classifier_pooling == "cls":
            return self.head(super().pool(x, texts))
        same = texts.visible(causal=False).astype(x.dtype)
        return self.head((same @ x) / jnp.sum(same, axis=-1, keepdims=True))
