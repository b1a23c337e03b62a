"""Ministral 3: Mistral with YaRN and queries scaled by their position, `model_type` ministral3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models import decoder, mistral
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import AttentionInputs, DecoderConfig, Defaults, read_decoder
from lora_jax.models.reader import FULL, ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.rope import ORIGINAL

_BETA = "llama_4_scaling_beta"
# Rotary settings of a config.json without any.
_USUAL = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16_384, _BETA: 0.1}
_USUAL |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@dataclass(frozen=True)
class Config(DecoderConfig):
    scaling_beta: float  # llama_4_scaling_beta

    @property
    def original_length(self) -> int:
        """Number of positions after which the scale of queries grows again."""
        return self.rope_parameters[FULL][ORIGINAL]


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    reader.only("rope_scaling", None, why="rope_parameters is the field")
    given = reader.content.get("rope_parameters")
    parameters: Mapping[str, Any] = _USUAL if given is None else given
    beta: Any = None
    if isinstance(parameters, Mapping):  # otherwise `read_decoder` refuses it
        beta = parameters.get(_BETA)
        own = (_BETA, "max_position_embeddings")  # the second is not read
        rest = {name: value for name, value in parameters.items() if name not in own}
        reader.content = {**reader.content, "rope_parameters": rest}
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not beta >= 0:
        reader.refuse(f"rope_parameters.{_BETA}={beta!r} is not a number of at least 0")
        beta = 0.0
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(131_072, 4096, 14_336, 34, 32),
            max_position_embeddings=262_144,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
        ),
        sliding_window=reader.optional_integer("sliding_window", None),
        rope_rules=RopeRules(types=("yarn",)),
    )
    return Config(**fields, scaling_beta=float(beta))


class Attention(decoder.Attention):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.beta, self.length = config.scaling_beta, config.original_length

    def queries(self, q: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """Return rotated queries (b, t, n, h) times 1 + beta * log(1 + position // length)."""
        lengths = (inputs.positions // self.length).astype(jnp.float32)
        scale = 1 + self.beta * jnp.log1p(lengths)[:, :, None, None]
        return super().queries(q, inputs) * scale.astype(q.dtype)


class Block(decoder.Block):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        attention, mlp = Attention(config, rngs=rngs), decoder.MLP(config, rngs=rngs)
        super().__init__(config, attention, mlp, rngs=rngs)


class Model(mistral.Model):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, Block, rngs=rngs)
