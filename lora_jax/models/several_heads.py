"""Decoders whose layers with a window and layers without one have heads of their own number and
size, and whose last layers may share the keys and values of earlier ones.

    layers       0    1    2    3    4    5
    layer_types  S    F    S    F    S    F       S: with a window, F: without one
    kv_sources             (num_kv_shared_layers=2)
                 -    -    -    -    2    3       the last layer of the kind that has its own

    self_attn / {q,k,v,o}_proj / kernel    without v_proj, values are keys before norm and rotation
    self_attn / {q,k}_norm / scale         values have a norm without a weight
    self_attn / {q,o}_proj, q_norm         all that layers with shared keys and values have

Each combination is a stack: see `lora_jax.models.stacks`.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
from flax import nnx

from lora_jax.models import decoder
from lora_jax.models.decoder import AttentionInputs, DecoderConfig
from lora_jax.models.reader import FULL, SLIDING, ConfigReader
from lora_jax.nn.attention import KVContext, attention
from lora_jax.nn.modules import UnitRMSNorm, WideRMSNorm

SHARED = " shared"  # end of the shapes of layers without keys and values of their own
SHAPES = (SLIDING, FULL, SLIDING + SHARED, FULL + SHARED)
_FIELDS = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True)
class HeadsConfig(DecoderConfig):
    """Head sizes of layers with a window are those of `DecoderConfig`."""

    attention_bias: bool
    full_kv_heads: int
    full_head_dim: int
    attention_k_eq_v: bool  # in layers without a window
    num_kv_shared_layers: int
    use_double_wide_mlp: bool  # in layers that share keys and values

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        full = (self.full_kv_heads, self.full_head_dim)
        own = (self.num_key_value_heads, self.head_dim)
        return tuple(full if kind == FULL else own for kind in self.layer_types)

    @property
    def kv_sources(self) -> tuple[int | None, ...]:
        first = self.num_hidden_layers - self.num_kv_shared_layers
        last = {kind: layer for layer, kind in enumerate(self.layer_types[:first])}
        kinds = enumerate(self.layer_types)
        return tuple(None if layer < first else last[kind] for layer, kind in kinds)

    @property
    def shapes(self) -> tuple[str, ...]:
        pairs = zip(self.layer_types, self.kv_sources, strict=True)
        return tuple(kind if source is None else kind + SHARED for kind, source in pairs)

    @property
    def unread(self) -> str:
        """Regex of tensors in published files that layers with shared keys do not read."""
        layers = [str(i) for i, source in enumerate(self.kv_sources) if source is not None]
        own = rf".*\blayers\.({'|'.join(layers)})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*"
        return own if layers else ""

    def of_shape(self, shape: str) -> Self:
        """Return the config with the sizes of the layers of one of `SHAPES`."""
        sizes: dict[str, int] = {}
        if shape.startswith(FULL):
            sizes = {"head_dim": self.full_head_dim, "num_key_value_heads": self.full_kv_heads}
        if shape.endswith(SHARED) and self.use_double_wide_mlp:
            sizes["intermediate_size"] = 2 * self.intermediate_size
        same = self.attention_k_eq_v and shape == FULL
        return replace(self, **sizes, attention_k_eq_v=same)


def read_heads(reader: ConfigReader, fields: dict[str, Any]) -> dict[str, Any]:
    """Read the fields of a `HeadsConfig` from config.json, given those of `read_decoder`. The sizes
    of full attention are in `per_layer_config` or, in earlier files, in fields of their own.
    """
    count, types = fields["num_hidden_layers"], fields["layer_types"]
    if types[-1] != FULL:
        types = (*types[:-1], FULL)
        reader.notes.append(f"config.json: the last layer has {FULL}, as in transformers")
    same = reader.boolean("attention_k_eq_v", False)
    size = reader.integer("global_head_dim", 512)
    number = reader.optional_integer("num_global_key_value_heads", None)
    number = (number if same else None) or fields["num_key_value_heads"]
    full = [layer for layer, kind in enumerate(types) if kind == FULL]
    given = reader.overrides(full, count, _FIELDS)
    if given is not None:
        size, number = (given.get(name, fields[name]) for name in _FIELDS)
    shared = reader.integer("num_kv_shared_layers", 0, least=0)
    if {*types[: max(0, count - shared)]} != {*types}:
        reader.refuse(
            f"num_kv_shared_layers={shared}: of {count} layers, some of each kind in layer_types "
            "must have keys and values of their own"
        )
        shared = 0
    return {
        **fields,
        "layer_types": types,
        "attention_bias": reader.boolean("attention_bias", False),
        "full_kv_heads": number,
        "full_head_dim": size,
        "attention_k_eq_v": same,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": reader.boolean("use_double_wide_mlp", False),
    }


class Attention(decoder.Attention):
    """Attention with norms of queries, keys and values, whose scores are not scaled."""

    def __init__(self, config: HeadsConfig, *, rngs: nnx.Rngs):
        bias, size, epsilon = config.attention_bias, config.head_dim, config.rms_norm_eps
        super().__init__(config, use_bias=bias, output_bias=bias, scale=1.0, rngs=rngs)
        self.q_norm, self.k_norm = (WideRMSNorm(size, epsilon, rngs=rngs) for _ in range(2))
        self.v_norm = UnitRMSNorm(epsilon)
        if config.attention_k_eq_v:
            del self.v_proj

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        k = self.heads(self.k_proj(x))
        v = self.heads(self.v_proj(x)) if hasattr(self, "v_proj") else k
        return self.project_queries(x), self.k_norm(k), self.v_norm(v)

    def project_queries(self, x: jax.Array) -> jax.Array:
        """Return queries (b, t, n, h), not yet rotated."""
        return self.q_norm(self.heads(self.q_proj(x)))


class SharedAttention(Attention):
    """Attention to the keys and values of an earlier layer."""

    def __init__(self, config: HeadsConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        del self.k_proj, self.v_proj, self.k_norm, self.v_norm

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any]:
        q = self.queries(self.project_queries(x), inputs)
        mixed = attention(q, [kv.cached.read()], inputs.masks, self.scale)
        return self.output(mixed.reshape(*x.shape[:2], -1)), kv.cached
