"""RoBERTa with a sequence-classification head, `model_type` roberta.

roberta / embeddings, encoder                     as `bert`
classifier / {dense,out_proj} / {kernel,bias}     (d, d), (d, labels)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import bert
from lora_jax.models.bert import RULES as RULES
from lora_jax.models.common import Names
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import Linear

ARCHITECTURE = "RobertaForSequenceClassification"
NAMES = Names(
    base="roberta.",
    no_weights=r"(roberta\.)?pooler\..*|lm_head\..*|.*embeddings\.position_ids",
    old=((".gamma", ".weight"), (".beta", ".bias")),
    heads=("classifier",),
)


class Config(bert.Config):
    @property
    def learned_positions(self) -> int:
        """The most tokens that a text can have: the first rows belong to padding."""
        return self.max_position_embeddings - self.pad_token_id - 1


def read_config(reader: ConfigReader, vocab_size: int = 50265) -> Config:
    """A `Config` from config.json; defaults are those of transformers."""
    return Config(**bert.read_fields(reader, vocab_size=vocab_size, pad_token_id=1))


class Head(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, use_bias=True, rngs=rngs)
        self.out_proj = Linear(d, len(config.labels), use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(jnp.tanh(self.dense(x)))


class Model(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.roberta = bert.Encoder(config, rngs=rngs)
        self.classifier = Head(config, rngs=rngs)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        token_types: jax.Array | None = None,
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
        kernel: str = "xla",
    ) -> tuple[jax.Array, None]:
        """What the labels of a text depend on, (b, t, d), the same at all of its tokens."""
        rows = positions + self.config.pad_token_id + 1
        # It has one type only; its tokenizer does not tell the texts of a pair apart by it.
        inputs = (tokens, rows, segment_ids, None, compute_dtype, remat, kernel)
        return bert.first_tokens(self.roberta(*inputs), positions), None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., d) -> (..., labels) in the dtype of `hidden`."""
        return self.classifier(hidden)
