"""StarCoder 2: layer norms, biases and an MLP of two linears, `model_type` starcoder2.

model / layers / mlp / {c_fc,c_proj} / kernel    (layers, d, f), (layers, f, d)
"""

from dataclasses import dataclass

from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.models import decoder
from lora_jax.models.decoder import DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import ConfigReader
from lora_jax.nn.modules import LayerNorm

RULES = (
    *decoder.RULES,
    (r"model\.layers\.mlp\.c_fc\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\.mlp\.c_fc\.bias", P("tensor")),
    (r"model\.layers\.mlp\.c_proj\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\.mlp\.c_proj\.bias", P(None)),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    use_bias: bool


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    # Fields of the published files that no code reads.
    reader.inert("activation_function", "layer_norm_epsilon", "scale_attn_weights")
    reader.inert("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    reader.only("mlp_type", "default")
    reader.only("norm_type", "layer_norm")
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(49_152, 3072, 12_288, 30, 24),
            max_position_embeddings=4096,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            epsilon="norm_epsilon",
            hidden_act=("hidden_act", "gelu_pytorch_tanh"),
            tie_word_embeddings=True,
        ),
        sliding_window=reader.optional_integer("sliding_window", None),
    )
    return Config(**fields, use_bias=reader.boolean("use_bias", True))


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        bias = config.use_bias
        attention = decoder.Attention(config, use_bias=bias, output_bias=bias, rngs=rngs)
        mlp = decoder.PlainMLP(config, ("c_fc", "c_proj"), use_bias=bias, rngs=rngs)
        super().__init__(config, attention, mlp, LayerNorm, rngs=rngs)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, LayerNorm, rngs=rngs)
