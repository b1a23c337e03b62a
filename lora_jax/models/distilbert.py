"""DistilBERT with a sequence-classification head, `model_type` distilbert.

distilbert / embeddings / {word,position}_embeddings / embedding, LayerNorm   (vocab, d), ...
distilbert / transformer / layer / attention / {q,k,v,out}_lin / {kernel,bias}
distilbert / transformer / layer / ffn / {lin1,lin2} / {kernel,bias}
distilbert / transformer / layer / {sa_layer_norm,output_layer_norm} / {scale,bias}
pre_classifier, classifier / {kernel,bias}                                    (d, d), (d, labels)
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import bert
from lora_jax.models.bert import Config, check_encoder, check_heads
from lora_jax.models.common import Execution, Names
from lora_jax.models.decoder import PlainMLP
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import ACTIVATIONS, Embed, LayerNorm, Linear
from lora_jax.nn.texts import Texts

RULES = (
    (r"distilbert\.embeddings\.word_embeddings\.embedding", P("tensor", "fsdp")),
    (r"distilbert\.embeddings\.position_embeddings\.embedding", P(None, "fsdp")),
    (r".*\.((q|k|v)_lin|lin1)\.kernel", P("fsdp", "tensor")),
    (r".*\.((q|k|v)_lin|lin1)\.bias", P("tensor")),
    (r".*\.(out_lin|lin2)\.kernel", P("tensor", "fsdp")),
    (r".*\.(out_lin|lin2)\.bias|.*(LayerNorm|layer_norm)\.(scale|bias)", P(None)),
    (r"(pre_)?classifier\..*", P(None)),
)
ARCHITECTURE = "DistilBertForSequenceClassification"
NAMES = Names(
    base="distilbert.",
    no_weights=r"vocab_(transform|layer_norm|projector)\..*|.*embeddings\.position_ids",
    old=bert.OLD,
    heads=("classifier", "pre_classifier"),
)
_EPSILON = 1e-12  # of all norms
# Other names of the fields that transformers accepts.
_ALIASES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    check_encoder(reader)
    # Sines are the first values of the position embeddings, which the files have.
    reader.inert("sinusoidal_pos_embds", "qa_dropout", "tie_weights_")
    for other, name in _ALIASES.items():
        reader.alias(other, name)
    hidden, heads = reader.size("dim", 768), reader.size("n_heads", 12)
    check_heads(reader, dim=hidden, n_heads=heads)
    return Config(
        vocab_size=reader.size("vocab_size", 30522),
        hidden_size=hidden,
        intermediate_size=reader.size("hidden_dim", 3072),
        num_hidden_layers=reader.size("n_layers", 6),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=reader.integer("max_position_embeddings", 512),
        type_vocab_size=1,
        layer_norm_eps=_EPSILON,
        hidden_act=reader.choice("activation", "gelu", ACTIVATIONS),
        pad_token_id=0,
        labels=reader.labels(),
    )


class Embeddings(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, d, rngs=rngs)
        self.position_embeddings = Embed(config.max_position_embeddings, d, rngs=rngs)
        self.LayerNorm = LayerNorm(d, _EPSILON, rngs=rngs)


class Attention(bert.SelfAttention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, ("q_lin", "k_lin", "v_lin"), rngs=rngs)
        self.out_lin = Linear(config.hidden_size, config.hidden_size, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, masks: Any) -> jax.Array:
        return self.out_lin(super().__call__(x, masks))


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.sa_layer_norm = LayerNorm(config.hidden_size, _EPSILON, rngs=rngs)
        self.ffn = PlainMLP(config, ("lin1", "lin2"), use_bias=True, rngs=rngs)
        self.output_layer_norm = LayerNorm(config.hidden_size, _EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, masks: Any) -> jax.Array:
        x = self.sa_layer_norm(self.attention(x, masks) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Encoder(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.transformer = bert.Layers(config, Block, rngs=rngs)


class Model(bert.Classifier):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.distilbert = Encoder(config, rngs=rngs)
        self.pre_classifier = Linear(d, d, use_bias=True, rngs=rngs)
        self.classifier = Linear(d, len(config.labels), use_bias=True, rngs=rngs)

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        own = self.distilbert.embeddings  # there are no token types
        x = own.word_embeddings(tokens) + own.position_embeddings(texts.positions)
        return self.distilbert.transformer(own.LayerNorm(x), texts, execution)

    def pool(self, x: jax.Array, texts: Texts) -> jax.Array:
        return jax.nn.relu(self.pre_classifier(super().pool(x, texts)))
