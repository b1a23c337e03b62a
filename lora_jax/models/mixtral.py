"""Mixtral: Mistral with routed experts, `model_type` mixtral."""

from dataclasses import dataclass

from flax import nnx

from lora_jax.models import decoder, sparse
from lora_jax.models.common import Names
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.models.sparse import RULES as RULES

NAMES = Names(
    renamed=((".mlp.", ".block_sparse_moe."),),
    experts={"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    num_local_experts: int
    num_experts_per_tok: int


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.alias("num_experts", "num_local_experts")
    sparse.note_router_loss(reader)
    experts = reader.integer("num_local_experts", 8)
    return Config(
        **read_decoder(
            reader,
            Defaults(
                sizes=(32000, 4096, 14336, 32, 32),
                max_position_embeddings=4096 * 32,
                num_key_value_heads=8,
                rms_norm_eps=1e-5,
            ),
            sliding_window=reader.optional_integer("sliding_window", None),
            rope_rules=RopeRules(theta=1_000_000.0),
        ),
        num_local_experts=experts,
        num_experts_per_tok=sparse.read_chosen(reader, experts, 2),
    )


class Block(sparse.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        mlp = sparse.SparseMLP(
            config,
            config.intermediate_size,
            experts=config.num_local_experts,
            chosen=config.num_experts_per_tok,
            normalize=True,
            rngs=rngs,
        )
        super().__init__(config, decoder.Attention(config, rngs=rngs), mlp, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
