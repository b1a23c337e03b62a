"""SmolLM 3: Llama without rotation in every fourth layer, `model_type` smollm3."""

from collections.abc import Callable

from lora_jax.models.decoder import RULES as RULES
from lora_jax.models.decoder import Defaults, read_decoder
from lora_jax.models.llama import Config
from lora_jax.models.llama import Model as Model
from lora_jax.models.reader import FULL, SLIDING, ConfigReader
from lora_jax.models.rotary import RopeRules
from lora_jax.nn.rope import NO_ROTATION

_PLAIN = " without rotation"  # behind the layer type


def read_config(reader: ConfigReader) -> Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    rotates = _read_rotations(reader)
    window = reader.optional_integer("sliding_window", None)
    window = window if reader.boolean("use_sliding_window", False) else None
    fields = read_decoder(
        reader,
        Defaults(
            sizes=(128_256, 2048, 11_008, 36, 16),
            max_position_embeddings=32_768,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
        sliding_window=window,
        slides=lambda layer: window is not None and not rotates(layer),
        rope_rules=RopeRules(theta=2_000_000.0),
    )
    types = enumerate(fields["layer_types"])
    fields["layer_types"] = tuple(kind if rotates(i) else kind + _PLAIN for i, kind in types)
    fields["rope_parameters"] |= {kind + _PLAIN: NO_ROTATION for kind in (FULL, SLIDING)}
    bias = reader.boolean("attention_bias", False)
    return Config(
        **fields,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
    )


def _read_rotations(reader: ConfigReader) -> Callable[[int], bool]:
    """Return a function that is True for a layer (from 0) whose queries and keys are rotated."""
    interval = reader.integer("no_rope_layer_interval", 4)
    given = reader.content.get("no_rope_layers")
    reader.inert("no_rope_layers")
    if given is None:
        return lambda layer: (layer + 1) % interval > 0
    layers = reader.content.get("num_hidden_layers", 36)
    if (
        not isinstance(given, list)
        or not all(number in (0, 1) for number in given)
        or (isinstance(layers, int) and len(given) < layers)
    ):
        reader.refuse(
            "no_rope_layers must have a 1 for each layer that rotates and a 0 for each other one"
        )
        return lambda layer: True
    return lambda layer: bool(given[layer])
