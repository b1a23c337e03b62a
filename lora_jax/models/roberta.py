"""RoBERTa with a sequence-classification head, `model_type` roberta.

roberta / embeddings, encoder                     as `bert`
classifier / {dense,out_proj} / {kernel,bias}     (d, d), (d, labels)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import bert
from lora_jax.models.bert import RULES as RULES
from lora_jax.models.common import Execution, Names
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import Linear
from lora_jax.nn.texts import Texts

ARCHITECTURE = "RobertaForSequenceClassification"
NAMES = Names(
    base="roberta.",
    no_weights=r"(roberta\.)?pooler\..*|lm_head\..*|.*embeddings\.position_ids",
    old=bert.OLD,
    heads=("classifier",),
)


class Config(bert.Config):
    @property
    def learned_positions(self) -> int:
        """Largest number of tokens of a text; the first rows of the embedding belong to padding."""
        return self.max_position_embeddings - self.pad_token_id - 1


def read_config(reader: ConfigReader, vocab_size: int = 50265) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    return Config(**bert.read_fields(reader, vocab_size=vocab_size, pad_token_id=1))


class Head(nnx.Module):
    """out_proj(act(dense(x)))."""

    def __init__(self, config: bert.Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, use_bias=True, rngs=rngs)
        self.out_proj = Linear(d, len(config.labels), use_bias=True, rngs=rngs)

    def act(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(self.act(self.dense(x)))


class Model(bert.Classifier):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.roberta = bert.Encoder(config, rngs=rngs)
        self.classifier = Head(config, rngs=rngs)

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        rows = texts.positions + self.config.pad_token_id + 1
        # There is one token type; the tokenizer does not mark the texts of a pair by it.
        return self.roberta(tokens, Texts(rows, texts.segment_ids), None, execution)
