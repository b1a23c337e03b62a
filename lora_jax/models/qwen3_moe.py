"""Qwen 3 MoE: Qwen 3 with routed experts in every layer, `model_type` qwen3_moe."""

from dataclasses import dataclass

from flax import nnx

from lora_jax.models import decoder, qwen2, qwen3, sparse
from lora_jax.models.common import Names
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.models.sparse import RULES as RULES

NAMES = Names(experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})


@dataclass(frozen=True)
class Config(qwen3.Config):
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.only("mlp_only_layers", [], None, why="every layer has experts")
    reader.only("decoder_sparse_step", 1, why="every layer has experts")
    reader.only("use_qk_norm", True)
    reader.inert("dual_chunk_attention_config")
    reader.alias("num_local_experts", "num_experts")
    sparse.note_router_loss(reader)
    experts = reader.integer("num_experts", 128)
    return Config(
        **read_decoder(
            reader,
            Defaults(
                sizes=(151_936, 2048, 6144, 24, 32),
                max_position_embeddings=32768,
                num_key_value_heads=4,
            ),
            sliding_window=qwen2.read_window(reader),
        ),
        attention_bias=reader.boolean("attention_bias", False),
        moe_intermediate_size=reader.integer("moe_intermediate_size", 768),
        num_experts=experts,
        num_experts_per_tok=sparse.read_chosen(reader, experts, 8),
        norm_topk_prob=reader.boolean("norm_topk_prob", False),
    )


class Block(sparse.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        mlp = sparse.SparseMLP(
            config,
            config.moe_intermediate_size,
            experts=config.num_experts,
            chosen=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            rngs=rngs,
        )
        super().__init__(config, qwen3.Attention(config, rngs=rngs), mlp, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
