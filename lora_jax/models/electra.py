"""ELECTRA with a sequence-classification head, `model_type` electra.

electra / embeddings / {word,position,token_type}_embeddings / embedding    (vocab, e), ...
electra / embeddings_project / {kernel,bias}                                (e, d), unless e = d
electra / encoder                                                           as `bert`
classifier / {dense,out_proj} / {kernel,bias}                               (d, d), (d, labels)
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import bert, roberta
from lora_jax.models.common import Execution, Names
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import ACTIVATIONS, Linear
from lora_jax.nn.texts import Texts

RULES = (*bert.RULES, (r"electra\.embeddings_project\.(kernel|bias)", P(None)))
ARCHITECTURE = "ElectraForSequenceClassification"
NAMES = Names(
    base="electra.",
    no_weights=r"(discriminator|generator)_(predictions|lm_head)\..*|.*embeddings\.position_ids",
    old=bert.OLD,
    heads=("classifier",),
)


@dataclass(frozen=True)
class Config(bert.Config):
    """Fields of a Hugging Face config that affect results, by their names."""

    embedding_size: int


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    # Those of heads for other uses than ours.
    reader.inert("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    fields = bert.read_fields(reader, vocab_size=30522, pad_token_id=0, sizes=(256, 1024, 4))
    return Config(**fields, embedding_size=reader.integer("embedding_size", 128))


class Encoder(bert.Encoder):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        e, d = config.embedding_size, config.hidden_size
        self.embeddings = bert.Embeddings(config, e, rngs=rngs)
        if e != d:
            self.embeddings_project = Linear(e, d, use_bias=True, rngs=rngs)

    def embed(self, tokens: jax.Array, positions: jax.Array, types: jax.Array) -> jax.Array:
        x = super().embed(tokens, positions, types)
        return self.embeddings_project(x) if hasattr(self, "embeddings_project") else x


class Head(roberta.Head):
    def act(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS["gelu"](x)  # whatever hidden_act is


class Model(bert.Classifier):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.electra = Encoder(config, rngs=rngs)
        self.classifier = Head(config, rngs=rngs)

    def encode(
        self, tokens: jax.Array, texts: Texts, types: jax.Array | None, execution: Execution
    ) -> jax.Array:
        return self.electra(tokens, texts, types, execution)
