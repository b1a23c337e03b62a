"""Qwen 3.5, dense: a gated delta rule in three of four layers, attention with an output gate in the
others, `model_type` qwen3_5_text.

model / layers / STACK / linear_attn / in_proj_{qkv,z,b,a} / kernel
model / layers / STACK / mlp / {gate,up,down}_proj / kernel

The rest is that of `hybrid`.
"""

from functools import partial

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder, hybrid
from lora_jax.models.common import Names
from lora_jax.models.decoder import Defaults
from lora_jax.models.hybrid import HybridConfig
from lora_jax.models.reader import ConfigReader
from lora_jax.models.towers import without_sections
from lora_jax.nn.delta_net import GatedDeltaNet, Sizes
from lora_jax.nn.modules import Linear, OffsetRMSNorm

RULES = (
    (r"model\.layers\..*\.in_proj_(qkv|z)\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.in_proj_(b|a)\.kernel", P("fsdp", None)),
    *hybrid.RULES,
    *decoder.RULES,
)
NAMES = Names(
    no_weights=hybrid.NO_WEIGHTS,
    moved=(("model.language_model.", "model."),),
)


def read_config(reader: ConfigReader) -> HybridConfig:
    """Read a `HybridConfig` from config.json; defaults are those of transformers."""
    reader.inert("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    reader.only("attn_output_gate", True)
    reader.only("output_gate_type", "swish")
    reader.content = without_sections(reader.content)
    defaults = Defaults(
        sizes=(248_320, 4096, 12_288, 32, 16),
        max_position_embeddings=32_768,
        num_key_value_heads=4,
        head_dim=256,
    )
    return HybridConfig(**hybrid.read_hybrid(reader, defaults))


class DeltaNet(GatedDeltaNet):
    """Gated delta net with a projection each for the convolution, gates, strengths and decays."""

    def make_projections(self, d: int, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.in_proj_qkv = Linear(d, 2 * sizes.keys + sizes.values, rngs=rngs)
        self.in_proj_z = Linear(d, sizes.values, rngs=rngs)
        self.in_proj_b = Linear(d, sizes.value_heads, rngs=rngs)
        self.in_proj_a = Linear(d, sizes.value_heads, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)


def make_block(config: HybridConfig, mixer: str, *, rngs: nnx.Rngs) -> hybrid.Block:
    """Return a layer with one of the mixers of `HybridConfig.kinds`."""
    return hybrid.Block(config, mixer, decoder.MLP(config, rngs=rngs), DeltaNet, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: HybridConfig, *, rngs: nnx.Rngs):
        blocks = {kind: partial(make_block, mixer=kind) for kind in config.kinds}
        super().__init__(config, blocks, OffsetRMSNorm, rngs=rngs)
