"""The decoder that Llama, Mistral, Qwen, Gemma, Phi and OLMo share: rotary positions,
grouped-query attention and a gated MLP.

model / embed_tokens / embedding                        (vocab, d)
model / layers / {input,post_attention}_layernorm / scale   (layers, d)
model / layers / self_attn / {q,k,v,o}_proj / kernel    (layers, in, out)
model / layers / mlp / {gate,up,down}_proj / kernel     (layers, in, out)
model / norm / scale                                    (d,)
lm_head / kernel                                        (d, vocab), unless tied
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.models.common import (
    ATTENTION,
    PLAIN,
    Execution,
    Routing,
    has_states,
    scan_layers,
)
from lora_jax.models.layer_inputs import AttentionInputs as AttentionInputs
from lora_jax.models.layer_inputs import KindInputs
from lora_jax.models.reader import SLIDING, ConfigReader
from lora_jax.models.rotary import PLAIN_ROPE, RopeRules, read_rope
from lora_jax.models.stacks import Blocks, make_layers, run_stacks
from lora_jax.nn.attention import KVContext, attend
from lora_jax.nn.cache import Cache, SharedKV
from lora_jax.nn.mlp import MLP as MLP
from lora_jax.nn.mlp import PlainMLP as PlainMLP
from lora_jax.nn.modules import ACTIVATIONS, Embed, Linear, RMSNorm
from lora_jax.nn.rope import by_length, rotate, text_lengths
from lora_jax.nn.texts import Texts
from lora_jax.nn.virtual import Virtual, by_layer, first_position, put_in
from lora_jax.shared_input import share

RULES = (
    (r"model\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|qkv|gate|up|gate_up)_proj\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|gate|up)_proj\.bias", P("tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.bias", P(None)),
    (r"model\.(layers\..*)?norm\.(scale|bias)", P(None)),
    (r"lm_head\.kernel", P("fsdp", "tensor")),
)
STATEFUL = (
    "texts of this model cannot share their starts: some layers pass a state from token to token"
)


@dataclass(frozen=True)
class DecoderConfig:
    """Fields of a Hugging Face config that affect the results of every decoder, by their names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_parameters: dict[str, dict[str, Any]]  # by layer type
    sliding_window: int | None
    layer_types: tuple[str, ...]  # a name that begins with `SLIDING` has the window

    @property
    def mixers(self) -> tuple[str, ...]:
        """Mixers of the tokens, by layer: `ATTENTION`, or one that keeps a state instead."""
        return (ATTENTION,) * self.num_hidden_layers

    @property
    def shapes(self) -> tuple[str, ...]:
        """The kind of each layer; layers of one kind have the same modules and sizes."""
        return self.mixers

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Number of key and value heads and their size, by layer."""
        return ((self.num_key_value_heads, self.head_dim),) * self.num_hidden_layers

    @property
    def kv_sources(self) -> tuple[int | None, ...]:
        """The layer whose keys and values a layer has in place of its own, or None."""
        return (None,) * self.num_hidden_layers

    @property
    def state_shapes(self) -> tuple[tuple[tuple[int, ...], Any], ...]:
        """Shapes and dtypes of what a layer without attention keeps of a text: see `CacheShape`."""
        return ()

    @property
    def ropes_by_length(self) -> list[dict[str, Any]]:
        """Rotary settings of the layers whose frequencies depend on the length of the text."""
        settings = [self.rope_parameters[kind] for kind in sorted({*self.layer_types})]
        return [parameters for parameters in settings if by_length(parameters)]


@dataclass(frozen=True)
class Defaults:
    """Defaults of a family's config class in transformers."""

    # vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    sizes: tuple[int, int, int, int, int] = (32000, 4096, 11008, 32, 32)
    max_position_embeddings: int = 2048
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    epsilon: str = "rms_norm_eps"  # the name of that field
    hidden_act: tuple[str, str] = ("hidden_act", "silu")  # the name of the field, and its default
    tie_word_embeddings: bool = False


def read_decoder(
    reader: ConfigReader,
    defaults: Defaults = Defaults(),
    *,
    sliding_window: int | None = None,
    slides: Callable[[int], bool] | None = None,
    rope_rules: RopeRules = PLAIN_ROPE,
) -> dict[str, Any]:
    """Read the fields of a `DecoderConfig` from config.json.

    Args:
        reader: the fields of config.json.
        defaults: values of the fields that it lacks.
        sliding_window: window of the layers that have one, in tokens.
        slides: True for a layer (from 0) that has a window, where `layer_types` is absent. Without
            it, all layers have the window or none has, and `layer_types` is not read.
        rope_rules: defaults and supported values of rotary settings.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads")
    vocab, hidden, intermediate, layers, heads = map(reader.size, names, defaults.sizes)
    positions = reader.integer("max_position_embeddings", defaults.max_position_embeddings)
    layer_types = reader.layer_types(
        layers, slides or (lambda layer: sliding_window is not None), read=slides is not None
    )
    kv_heads = reader.optional_integer("num_key_value_heads", defaults.num_key_value_heads)
    if defaults.head_dim is None:
        head_dim = reader.optional_integer("head_dim", None) or max(1, hidden // heads)
    else:
        head_dim = reader.integer("head_dim", defaults.head_dim)
    if SLIDING in layer_types and sliding_window is None:
        reader.refuse(f"there are layers with {SLIDING}, and sliding_window is null or not in use")
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head_dim,
        "rms_norm_eps": reader.number(defaults.epsilon, defaults.rms_norm_eps, least=0),
        "hidden_act": reader.choice(*defaults.hidden_act, ACTIVATIONS),
        "max_position_embeddings": positions,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", defaults.tie_word_embeddings),
        "rope_parameters": read_rope(reader, positions, head_dim, rope_rules),
        "sliding_window": sliding_window,
        "layer_types": layer_types,
    }


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions. A family that computes queries, keys and
    values otherwise overrides `project`; one with other rotations or another name of the output
    projection `rotate` or `output`; one that scales queries `queries`; one with a sink in the
    softmax of each head `sink_logits`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        use_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        rngs: nnx.Rngs,
    ):
        d, h = config.hidden_size, config.head_dim
        n, k = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(d, n * h, use_bias=use_bias, rngs=rngs)
        self.k_proj = Linear(d, k * h, use_bias=use_bias, rngs=rngs)
        self.v_proj = Linear(d, k * h, use_bias=use_bias, rngs=rngs)
        self.o_proj = Linear(n * h, d, use_bias=output_bias, rngs=rngs)
        self.head_dim, self.softcap = h, softcap
        self.scale = h**-0.5 if scale is None else scale

    def project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries (b, t, n, h), keys and values (b, t, k, h), not yet rotated; and what else
        `output` takes.
        """
        return self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def heads(self, x: jax.Array) -> jax.Array:
        """Reshape (b, t, heads * h) to (b, t, heads, h)."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def rotate(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """Rotate queries or keys (b, t, heads, h) by their positions."""
        return rotate(x, inputs.cos_sin)

    def queries(self, q: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """Return the queries (b, t, n, h) that are compared with keys."""
        return self.rotate(q, inputs)

    def sink_logits(self) -> jax.Array | None:
        """Return the score of each head's sink (n,), or None."""
        return None

    def output(self, mixed: jax.Array, *rest: jax.Array) -> jax.Array:
        """Return the output (b, t, d) of all heads (b, t, n * h)."""
        return self.o_proj(mixed)

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any]:
        """Return the output (b, t, d) for x (b, t, d), and the cache with the new tokens."""
        q, k, v, *rest = self.project(share(x))
        q, k = self.queries(q, inputs), self.rotate(k, inputs)
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        scores = (self.scale, self.softcap, self.sink_logits())
        mixed, cached = attend(q, new, kv, inputs.masks, *scores)
        return self.output(mixed.reshape(*x.shape[:2], -1), *rest), cached


class Block(nnx.Module):
    """A layer with norms before attention and MLP, all given by the family."""

    def __init__(
        self,
        config: DecoderConfig,
        attention: Any,
        mlp: Any,
        norm: Callable = RMSNorm,
        *,
        rngs: nnx.Rngs,
    ):
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = attention
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        y, cached = self.self_attn(self.input_layernorm(x), inputs, kv)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cached, None


class ParallelBlock(nnx.Module):
    """A layer whose attention and MLP both read one norm of its input."""

    def __init__(
        self, config: DecoderConfig, attention: Any, mlp: Any, norm: Callable, *, rngs: nnx.Rngs
    ):
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = attention
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kv: KVContext
    ) -> tuple[jax.Array, Any, Any]:
        normed = share(self.input_layernorm(x))
        y, cached = self.self_attn(normed, inputs, kv)
        return x + y + self.mlp(normed), cached, None


class Decoder(nnx.Module):
    def __init__(self, config: Any, blocks: Blocks, norm: Callable, *, rngs: nnx.Rngs):
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = make_layers(config, blocks, rngs)
        self.norm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)


class CausalLM(nnx.Module):
    """Embedding, layers, norm and output head.

    `blocks(config, rngs=...)` makes one layer; for layers of several kinds there is a function for
    each (`shapes` of the config). The call of a layer returns its output, its cache with the new
    tokens, and its `Routing` (None without experts).
    """

    def __init__(
        self, config: DecoderConfig, blocks: Blocks, norm: Callable = RMSNorm, *, rngs: nnx.Rngs
    ):
        self.config: Any = config  # the family's
        self.model = Decoder(config, blocks, norm, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    @property
    def decoder(self) -> Any:
        """Return the module of embedding and layers."""
        return self.model

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Return the embeddings (b, t, d) of tokens (b, t)."""
        return self.decoder.embed_tokens(tokens).astype(dtype)

    def first_input(self, embeddings: jax.Array) -> jax.Array:
        """Return the input of the first layer for embeddings (b, t, d), virtual tokens included."""
        return embeddings

    def per_layer(self, tokens: jax.Array, embeddings: jax.Array) -> Any:
        """Return inputs of the layers next to the stream, with a leading layer axis, or None."""
        return None

    def hidden(self, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Cache | None]:
        """Return the first two results of `hidden_and_routing`."""
        return self.hidden_and_routing(tokens, **inputs)[:2]

    def hidden_and_routing(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        seen_until: jax.Array | None = None,
        cache: Cache | None = None,
        prefix: Virtual | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        """Return final hidden states (b, t, d) of tokens (b, t); the cache with the tokens written,
        if one is given; and the `Routing` of all layers, if there are experts.

        With a `Prompt`, each text of the batch must begin with placeholders for it. Texts that
        share their start are described by `seen_until` (b, t): see `lora_jax.nn.texts`.
        """
        config = self.config
        if seen_until is not None and has_states(config):
            raise UserError(STATEFUL)
        lengths = None if cache is None else cache.lengths
        if lengths is None and config.ropes_by_length:
            lengths = text_lengths(positions, segment_ids)
        embedded = put_in(self.embed(tokens, execution.dtype), positions, prefix)
        own, texts = by_layer(prefix), Texts(positions, segment_ids, seen_until)
        moved = positions + first_position(prefix)
        lengths = None if lengths is None else lengths + first_position(prefix)
        by_kind = KindInputs.of(config, texts, moved, lengths)
        by_kind = by_kind.with_masks(config, execution.kernel, cache, own)
        placed = None if cache is None else (cache, cache.places(positions, segment_ids))

        def scan(run, layers, x, per_layer, shared, cache):
            present, kind_of_layer = by_kind.kinds_of(run.layers)

            def block(x, layer, each, cached):
                (prefix, more), kind = each
                given = shared if shared is not None else cached
                if run.is_source and given is None:
                    given = SharedKV()
                inputs = by_kind.choose(present, kind, more)
                x, new, routing = layer(x, inputs, KVContext(given, prefix))
                kept = SharedKV(*new.read()) if run.is_source else None
                return x, (routing, kept), None if cached is None else new

            each = (per_layer, kind_of_layer)
            return scan_layers(block, layers, x, each, execution.remat, cache, run.cached)

        per_layer = (own, self.per_layer(tokens, embedded))
        x, cache, routing = run_stacks(
            scan, self.decoder.layers, config, self.first_input(embedded), per_layer, placed
        )
        return self.final_norm(x), cache, routing

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Return the norm (b, t, d) of the output of the last layer."""
        return self.decoder.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits (..., vocab) of hidden states (..., d), in their dtype."""
        return (
            self.decoder.embed_tokens.attend(hidden)
            if self.config.tie_word_embeddings
            else self.lm_head(hidden)
        )
