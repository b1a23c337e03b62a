"""BERT with a sequence-classification head, `model_type` bert.

bert / embeddings / {word,position,token_type}_embeddings / embedding     (vocab, d), ...
bert / encoder / layer / attention / self / {query,key,value} / {kernel,bias}
bert / encoder / layer / attention / output / {dense / {kernel,bias}, LayerNorm / {scale,bias}}
bert / encoder / layer / intermediate / dense, output / {dense, LayerNorm}
bert / pooler / dense / {kernel,bias}                                     (d, d)
classifier / {kernel,bias}                                                (d, labels)

Dropout that configs ask for in training is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models.common import PLAIN, Execution, Names, scan_layers
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.attention import attention
from lora_jax.nn.kernels import MaskSpec
from lora_jax.nn.modules import ACTIVATIONS, Embed, LayerNorm, Linear
from lora_jax.nn.texts import Texts
from lora_jax.shared_input import share

RULES = (
    (r"\w+\.embeddings\.word_embeddings\.embedding", P("tensor", "fsdp")),
    (r"\w+\.embeddings\.(position|token_type)_embeddings\.embedding", P(None, "fsdp")),
    (r".*\.(query|key|value|intermediate\.dense)\.kernel", P("fsdp", "tensor")),
    (r".*\.(query|key|value|intermediate\.dense)\.bias", P("tensor")),
    (r".*\.output\.dense\.kernel", P("tensor", "fsdp")),
    (r".*LayerNorm\.(scale|bias)|.*\.output\.dense\.bias", P(None)),
    (r"\w+\.pooler\.dense\.(kernel|bias)|classifier\..*", P(None)),
)
ARCHITECTURE = "BertForSequenceClassification"
OLD = ((".gamma", ".weight"), (".beta", ".bias"))  # norms in files made from TensorFlow's
NAMES = Names(
    base="bert.",
    no_weights=r"cls\..*|.*embeddings\.position_ids",
    old=OLD,
    heads=("classifier", "bert.pooler"),
)


@dataclass(frozen=True)
class Config:
    """Fields of a Hugging Face config that affect results, by their names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    pad_token_id: int
    labels: tuple[str, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def learned_positions(self) -> int:
        """Largest number of tokens of a text."""
        return self.max_position_embeddings


def check_encoder(reader: ConfigReader) -> None:
    """Refuse a config of another use of an encoder than the classification of whole texts."""
    reader.inert("tie_word_embeddings")
    for name in ("is_decoder", "add_cross_attention"):
        reader.only(name, False, None)
    reader.only("is_causal", False, None, why="transformers then masks the tokens after each")
    reader.only("position_embedding_type", "absolute", None)
    reader.only("problem_type", "single_label_classification", None, why="one class for a text")


def check_heads(reader: ConfigReader, **sizes: int) -> None:
    """Refuse a hidden size that is not a multiple of the number of heads: in this order, by their
    names in the family.
    """
    (width, hidden), (count, heads) = sizes.items()
    if hidden % heads:
        reader.refuse(f"{width}={hidden} is not a multiple of {count}={heads}")


def read_fields(
    reader: ConfigReader,
    vocab_size: int,
    pad_token_id: int,
    sizes: tuple[int, int, int] = (768, 3072, 12),
) -> dict[str, Any]:
    """Read the fields of a `Config`; defaults are those of transformers. `sizes` are those of
    hidden_size, intermediate_size and num_attention_heads.
    """
    check_encoder(reader)
    reader.inert("layer_types", "directionality", "embedding_size")
    reader.inert("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
    reader.inert("pooler_size_per_head", "pooler_type")
    hidden = reader.size("hidden_size", sizes[0])
    heads = reader.size("num_attention_heads", sizes[2])
    check_heads(reader, hidden_size=hidden, num_attention_heads=heads)
    return {
        "vocab_size": reader.size("vocab_size", vocab_size),
        "hidden_size": hidden,
        "intermediate_size": reader.size("intermediate_size", sizes[1]),
        "num_hidden_layers": reader.size("num_hidden_layers", 12),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": reader.integer("max_position_embeddings", 512),
        "type_vocab_size": reader.integer("type_vocab_size", 2),
        "layer_norm_eps": reader.number("layer_norm_eps", 1e-12, least=0),
        "hidden_act": reader.choice("hidden_act", "gelu", ACTIVATIONS),
        "pad_token_id": reader.integer("pad_token_id", pad_token_id, least=0),
        "labels": reader.labels(),
    }


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json."""
    return Config(**read_fields(reader, vocab_size=30522, pad_token_id=0))


class Embeddings(nnx.Module):
    def __init__(self, config: Config, features: int, *, rngs: nnx.Rngs):
        d = features
        self.word_embeddings = Embed(config.vocab_size, d, rngs=rngs)
        self.position_embeddings = Embed(config.max_position_embeddings, d, rngs=rngs)
        self.token_type_embeddings = Embed(config.type_vocab_size, d, rngs=rngs)
        self.LayerNorm = LayerNorm(d, config.layer_norm_eps, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        words, places = self.word_embeddings(tokens), self.position_embeddings(positions)
        return self.LayerNorm(words + self.token_type_embeddings(types) + places)


class SelfAttention(nnx.Module):
    """Attention without its output projection, with the family's names of the three linears."""

    def __init__(
        self,
        config: Config,
        names: tuple[str, str, str] = ("query", "key", "value"),
        *,
        rngs: nnx.Rngs,
    ):
        d = config.hidden_size
        for name in names:
            setattr(self, name, Linear(d, d, use_bias=True, rngs=rngs))
        self.names, self.head_dim = names, config.head_dim

    def __call__(self, x: jax.Array, masks: Any) -> jax.Array:
        shared = share(x)
        q, k, v = (
            getattr(self, name)(shared).reshape(*x.shape[:2], -1, self.head_dim)
            for name in self.names
        )
        blocks = [(k.swapaxes(1, 2), v.swapaxes(1, 2))]
        return attention(q, blocks, masks, self.head_dim**-0.5).reshape(x.shape)


class Output(nnx.Module):
    """A linear, its result added to the residual `before`, and the norm of the sum."""

    def __init__(self, config: Config, features_in: int, *, rngs: nnx.Rngs):
        self.dense = Linear(features_in, config.hidden_size, use_bias=True, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + before)


class Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.self = SelfAttention(config, rngs=rngs)
        self.output = Output(config, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array, masks: Any) -> jax.Array:
        return self.output(self.self(x, masks), x)


class Dense(nnx.Module):
    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs):
        self.dense = Linear(features_in, features_out, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.output = Output(config, config.intermediate_size, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array, masks: Any) -> jax.Array:
        x = self.attention(x, masks)
        return self.output(ACTIVATIONS[self.act](self.intermediate(share(x))), x)


def masks(texts: Texts, execution: Execution, window: int | None = None) -> Any:
    """Return the masks argument of `attention`: every token sees those of its text on both sides,
    with a `window` those fewer than `window` tokens away.
    """
    if execution.kernel == "xla":
        return (texts.visible(causal=False, window=window),)
    return MaskSpec(texts, jnp.int32(0), execution.kernel, (window,), causal=False)


class Layers(nnx.Module):
    """Layers of which every token sees all tokens of its text."""

    def __init__(self, config: Config, block: Callable = Block, *, rngs: nnx.Rngs):
        self.layer = nnx.vmap(lambda own: block(config, rngs=own))(
            rngs.split(config.num_hidden_layers)
        )

    def __call__(self, x: jax.Array, texts: Texts, execution: Execution) -> jax.Array:
        """Return the output (b, t, d) of the last layer for embeddings (b, t, d)."""
        seen = masks(texts, execution)

        def run(x, layer, own, cached):
            return layer(x, seen), None, cached

        x = x.astype(execution.dtype)
        return scan_layers(run, self.layer, x, None, execution.remat)[0]


class Encoder(nnx.Module):
    """Embeddings and layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, config.hidden_size, rngs=rngs)
        self.encoder = Layers(config, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        texts: Texts,
        token_types: jax.Array | None,
        execution: Execution,
    ) -> jax.Array:
        """Return hidden states (b, t, d) of tokens (b, t); positions of `texts` are rows of the
        position embeddings.
        """
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        return self.encoder(self.embed(tokens, texts.positions, types), texts, execution)

    def embed(self, tokens: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        """Return the input (b, t, d) of the first layer."""
        return self.embeddings(tokens, positions, types)


def first_tokens(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Return x (b, t, d) with each token replaced by the first of its text, at position 0."""
    starts = jnp.arange(x.shape[1]) - positions
    return jnp.take_along_axis(x, starts[:, :, None], axis=1)


class Classifier(nnx.Module):
    """Model that gives every text one of the labels. A family defines `encode` and `classifier`,
    and `pool` where something comes between them.
    """

    classifier: Any

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        """Return the output (b, t, d) of the last layer."""
        raise NotImplementedError

    def pool(self, x: jax.Array, texts: Texts) -> jax.Array:
        """Return the input (b, t, d) of the classifier, the same at all tokens of a text."""
        return first_tokens(x, texts.positions)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        token_types: jax.Array | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[jax.Array, None]:
        """Return the input (b, t, d) of the classifier, the same at all tokens of a text."""
        texts = Texts(positions, segment_ids)
        return self.pool(self.encode(tokens, texts, token_types, execution), texts), None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits (..., labels) of hidden states (..., d), in their dtype."""
        return self.classifier(hidden)


class PooledEncoder(Encoder):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.pooler = Dense(config.hidden_size, config.hidden_size, rngs=rngs)


class Model(Classifier):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.bert = PooledEncoder(config, rngs=rngs)
        self.classifier = Linear(config.hidden_size, len(config.labels), use_bias=True, rngs=rngs)

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        return self.bert(tokens, texts, types, execution)

    def pool(self, x: jax.Array, texts: Texts) -> jax.Array:
        return jnp.tanh(self.bert.pooler(super().pool(x, texts)))
