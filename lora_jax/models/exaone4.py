"""EXAONE 4: OLMo 2 with Qwen 3's norms of heads, a window in three of four layers and no rotation
in the others, `model_type` exaone4.

model / layers / self_attn / {q,k}_norm / scale    (layers, head_dim)
"""

import functools

from flax import nnx

from lora_jax.models import decoder, olmo2
from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.qwen3 import Attention, Config
from lora_jax.models.reader import FULL, ConfigReader
from lora_jax.nn.rope import NO_ROTATION


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers. Layers without a window
    rotate if `sliding_window` is null.
    """
    window, pattern = reader.optional_integer("sliding_window", 4096), 4
    if reader.content.get("layer_types") is not None or window is None:
        reader.inert("sliding_window_pattern")  # may be text there, as "LLLG"
    else:
        pattern = reader.integer("sliding_window_pattern", pattern)
    fields = read_decoder(
        reader,
        Defaults((102_400, 4096, 16_384, 32, 32), num_key_value_heads=32, rms_norm_eps=1e-5),
        sliding_window=window,
        slides=lambda layer: window is not None and (layer + 1) % pattern > 0,
    )
    if window is not None:
        fields["rope_parameters"] |= {FULL: NO_ROTATION}
    return Config(**fields, attention_bias=False)


class Model(decoder.CausalLM):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, functools.partial(olmo2.Block, attention=Attention), rngs=rngs)
