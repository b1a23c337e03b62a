"""Qwen 3 Next: a gated delta rule in three of four layers, attention with an output gate in the
others, and routed experts with one that every token uses, `model_type` qwen3_next.

model / layers / STACK / linear_attn / in_proj_{qkvz,ba} / kernel     see `nn.delta_net`
model / layers / STACK / mlp / shared_expert / {gate,up,down}_proj / kernel
model / layers / STACK / mlp / shared_expert_gate / kernel            (layers, d, 1)

The rest is that of `hybrid` and `sparse`.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder, hybrid, sparse
from lora_jax.models.common import Names, Routing
from lora_jax.models.decoder import Defaults
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import Linear, OffsetRMSNorm

RULES = (
    (r"model\.layers\..*\.in_proj_qkvz\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.(in_proj_ba|shared_expert_gate)\.kernel", P("fsdp", None)),
    *hybrid.RULES,
    *sparse.RULES,
)
NAMES = Names(
    no_weights=hybrid.NO_WEIGHTS,
    experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)


@dataclass(frozen=True)
class Config(hybrid.HybridConfig):
    has_experts: tuple[bool, ...]  # by layer
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    @property
    def shapes(self) -> tuple[str, ...]:
        pairs = zip(self.kinds, self.has_experts, strict=True)
        return tuple(f"{kind}, experts" if has_experts else kind for kind, has_experts in pairs)


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    sparse.note_router_loss(reader)
    fields = hybrid.read_hybrid(
        reader,
        Defaults(
            sizes=(151_936, 2048, 5632, 48, 16),
            max_position_embeddings=32_768,
            num_key_value_heads=2,
            head_dim=256,
        ),
    )
    layers = range(fields["num_hidden_layers"])
    step, dense = reader.integer("decoder_sparse_step", 1), reader.indices("mlp_only_layers", ())
    experts = reader.integer("num_experts", 512)
    return Config(
        **fields,
        has_experts=tuple((i + 1) % step == 0 and i not in dense for i in layers),
        moe_intermediate_size=reader.integer("moe_intermediate_size", 512),
        shared_expert_intermediate_size=reader.integer("shared_expert_intermediate_size", 512),
        num_experts=experts,
        num_experts_per_tok=sparse.read_chosen(reader, experts, 10),
        norm_topk_prob=reader.boolean("norm_topk_prob", True),
    )


class SparseMLP(sparse.SparseMLP):
    """Routed experts, and one for all tokens, times a gate."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            config.moe_intermediate_size,
            experts=config.num_experts,
            chosen=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            rngs=rngs,
        )
        f = config.shared_expert_intermediate_size
        shared = dataclasses.replace(config, intermediate_size=f)
        self.shared_expert = decoder.MLP(shared, rngs=rngs)
        self.shared_expert_gate = Linear(config.hidden_size, 1, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Routing]:
        y, routing = super().__call__(x, real)
        return y + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x), routing


def make_block(config: Config, shape: str, *, rngs: nnx.Rngs) -> hybrid.Block:
    """Return a layer of one of `Config.shapes`."""
    mixer, comma, _ = shape.partition(", ")
    if comma:
        return hybrid.SparseBlock(config, mixer, SparseMLP(config, rngs=rngs), rngs=rngs)
    return hybrid.Block(config, mixer, decoder.MLP(config, rngs=rngs), rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        blocks = {shape: partial(make_block, shape=shape) for shape in config.shapes}
        super().__init__(config, blocks, OffsetRMSNorm, rngs=rngs)
