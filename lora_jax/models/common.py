"""Parts that every family shares: the `Model` value, the scan over stacked layers, and the decoder
that Llama, Mistral, Qwen, Gemma, Phi and OLMo vary.

model / embed_tokens / embedding                        (vocab, d)
model / layers / {input,post_attention}_layernorm / scale   (layers, d)
model / layers / self_attn / {q,k,v,o}_proj / kernel    (layers, in, out)
model / layers / mlp / {gate,up,down}_proj / kernel     (layers, in, out)
model / norm / scale                                    (d,)
lm_head / kernel                                        (d, vocab), unless tied
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.models.reader import FULL, SLIDING, ConfigReader
from lora_jax.models.rotary import read_rope
from lora_jax.nn.modules import (
    ACTIVATIONS,
    Cache,
    Embed,
    Linear,
    Past,
    RMSNorm,
    attend,
    empty_cache,
    sights,
)
from lora_jax.nn.rope import by_length, rope, rotate, text_lengths
from lora_jax.nn.virtual import Virtual, by_layer, first_position, placeholders, put_in
from lora_jax.sharding import Rules, constrain_stream
from lora_jax.tree import check_parameters, dotted, flatten, summarize

RULES = (
    (r"model\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|qkv|gate|up|gate_up)_proj\.kernel", P("fsdp", "tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.kernel", P("tensor", "fsdp")),
    (r"model\.layers\..*\.(q|k|v|gate|up)_proj\.bias", P("tensor")),
    (r"model\.layers\..*\.(o|down)_proj\.bias", P(None)),
    (r"model\.(layers\..*)?norm\.scale", P(None)),
    (r"lm_head\.kernel", P("fsdp", "tensor")),
)


def scan_layers(
    block: Callable, layers: nnx.Module, x: jax.Array, per_layer: Any, remat: str
) -> tuple[jax.Array, Any]:
    """Run `block(x, layer, own) -> (x, out)` over stacked layers, `own` being each layer's slice of
    `per_layer`. `remat` says what the backward pass keeps: none, everything; dots, the results of
    products; full, what runs from layer to layer; offload, the same in host memory.
    """
    graphdef, state = nnx.split(layers)

    def body(x, slices):
        state, own = slices
        x = checkpoint_name(constrain_stream(x), "stream")
        return block(x, nnx.merge(graphdef, state), own)

    policies = jax.checkpoint_policies
    match remat:
        case "full":
            body = jax.checkpoint(body, prevent_cse=False)
        case "dots":
            body = jax.checkpoint(
                body, prevent_cse=False, policy=policies.dots_with_no_batch_dims_saveable
            )
        case "offload":
            keep = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["stream"],
                offload_src="device",
                offload_dst="pinned_host",
            )
            body = jax.checkpoint(body, prevent_cse=False, policy=keep)
    return jax.lax.scan(body, x, (state, per_layer))


@dataclass(frozen=True)
class Names:
    """Names of tensors in a family's files, where they are not the paths of its tree."""

    base: str = "model."  # prefix that files of the bare model leave out
    no_weights: str = r".*rotary_emb\.inv_freq"  # regex of tensors that hold none
    renamed: tuple[tuple[str, str], ...] = ()  # text in a module path -> text in the file
    old: tuple[tuple[str, str], ...] = ()  # ends of names in old files -> what they are now
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # parts joined along out
    heads: tuple[str, ...] = ()  # modules that files may lack: they start at random, and train


@dataclass(frozen=True)
class Model:
    """A model as a value: its static structure and a tree of frozen parameters (arrays, or only
    their shapes).
    """

    graphdef: Any
    template: Any  # NNX state of shapes, the form that `graphdef` is merged with
    params: dict
    config: Any  # the family's Config
    hf_config: dict[str, Any]  # config.json as it was read
    rules: Rules
    names: Names = Names()
    directory: Path = Path()  # where its files are
    fresh: tuple[str, ...] = ()  # of `names.heads`: those that are not taken from the files
    notes: tuple[str, ...] = ()  # fields of config.json that are read in another way than written

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier; empty for a model that writes text."""
        return getattr(self.config, "labels", ())

    @property
    def learned_positions(self) -> int | None:
        """The most tokens that a text can have, where every position has a row of its own."""
        return getattr(self.config, "learned_positions", None)

    def check_tokens(self, tokens: Any, what: str = "tokens") -> None:
        """Raise for tokens that the embedding has no row for.

        Raises:
            UserError: tokens that are no integers, negative, or of the vocabulary size or above.
        """
        size, tokens = self.config.vocab_size, np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise UserError(f"{what} must be integers, not {tokens.dtype}")
        if (token := foreign_token(tokens, size)) is not None:
            raise UserError(
                f"{what}: token {token} is not one of the model's, which are 0 to {size - 1} "
                "(vocab_size in config.json); use the tokenizer that belongs to the model"
            )

    def module(self, params: Mapping) -> Any:
        """The NNX module over `params` (plain, bound or merged), with methods `hidden` and
        `logits`.

        Raises:
            UserError: adapters, or a tree of other paths than the model's.
        """
        call = (
            "a model runs on parameters, model.apply(lora.bind(params, adapters, config), tokens)"
        )
        check_parameters(params, call)
        want, have = flatten(nnx.to_pure_dict(self.template)), flatten(params)
        lists = {"missing": want.keys() - have.keys(), "unexpected": have.keys() - want.keys()}
        problems = [f"{what} {dotted(path)}" for what in lists for path in sorted(lists[what])]
        if problems:
            raise UserError("these parameters are not the model's: " + summarize(problems))
        state = jax.tree.map(lambda leaf: leaf, self.template)
        nnx.replace_by_pure_dict(state, _keys_like(params))
        return nnx.merge(self.graphdef, state)

    def apply(
        self,
        params: Mapping,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        prefix: Virtual | None = None,
        compute_dtype: Any = jnp.float32,
        return_hidden: bool = False,
        **inputs: Any,
    ) -> Any:
        """Logits (b, t, vocab) of tokens (b, t). Without segment_ids all tokens of a row are one
        text. A model that classifies gives (b, t, labels), the same at all tokens of a text, and
        takes `token_types` (b, t).

        `prefix` holds virtual tokens (`adapters.prefix`), in front of every row: a `Prompt` gets
        its places here, unless the batch has segment_ids and with them places of its own.

        With `return_hidden` it returns logits and the hidden states (b, t, d) that they are a
        function of: the output of the last layer after the final norm, transformers'
        `last_hidden_state`. For a classifier that is what its labels depend on. Inside `jit`,
        logits that are not used cost nothing.

        Raises:
            UserError: as `module`; as `check_tokens`, outside of jit.
        """
        module = self.module(params)  # first: it explains arguments that are swapped
        tokens, inserted = jnp.asarray(tokens), 0
        if not isinstance(tokens, Tracer) and tokens.is_fully_addressable:
            self.check_tokens(tokens)
        if segment_ids is None and positions is None:
            inserted = placeholders(prefix)
            tokens = jnp.pad(tokens, ((0, 0), (inserted, 0)))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if prefix is not None:
            inputs = {"prefix": prefix, **inputs}
        hidden, _ = module.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            compute_dtype=compute_dtype,
            **inputs,
        )
        hidden = hidden[:, inserted:]
        logits = module.logits(hidden)
        return (logits, hidden) if return_hidden else logits

    def empty_cache(self, rows: int, slots: int, dtype: Any) -> Cache:
        """A cache for `rows` texts of up to `slots` tokens."""
        c = self.config
        return empty_cache(
            c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim, dtype
        )

    def replace(self, **changes: Any) -> "Model":
        return dataclasses.replace(self, **changes)


def foreign_token(tokens: np.ndarray, vocab_size: int) -> int | None:
    """The first of some tokens that an embedding of `vocab_size` rows does not have."""
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    return int(outside[0]) if outside.size else None


def _keys_like(params: Mapping) -> dict:
    return {
        key: _keys_like(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of a Hugging Face config that decide the numbers of every family here, under their
    own names.
    """

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
    layer_types: tuple[str, ...]

    @property
    def ropes_by_length(self) -> list[dict[str, Any]]:
        """Rotary settings of layers whose frequencies depend on the length of the text."""
        settings = [self.rope_parameters[kind] for kind in sorted({*self.layer_types})]
        return [parameters for parameters in settings if by_length(parameters)]


def read_decoder(
    reader: ConfigReader,
    *,
    sizes: tuple[int, int, int, int, int] = (32000, 4096, 11008, 32, 32),
    max_position_embeddings: int = 2048,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    rms_norm_eps: float = 1e-6,
    hidden_act: tuple[str, str] = ("hidden_act", "silu"),
    tie_word_embeddings: bool = False,
    sliding_window: int | None = None,
    slides: Callable[[int], bool] | None = None,
    **rope_options: Any,
) -> dict[str, Any]:
    """Read the fields of a `DecoderConfig`. The arguments are the defaults of the family's config
    class in transformers; `sizes` are those of vocab_size, hidden_size, intermediate_size,
    num_hidden_layers and num_attention_heads.

    `slides` names the layers with a window, if `layer_types` does not. Without it the family has a
    window in all layers or in none, and `layer_types` is not read.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads")
    vocab, hidden, intermediate, layers, heads = map(reader.size, names, sizes)
    positions = reader.integer("max_position_embeddings", max_position_embeddings)
    layer_types = reader.layer_types(
        layers, slides or (lambda layer: sliding_window is not None), read=slides is not None
    )
    kv_heads = reader.optional_integer("num_key_value_heads", num_key_value_heads)
    if head_dim is None:
        head_dim = reader.optional_integer("head_dim", None) or max(1, hidden // heads)
    else:
        head_dim = reader.integer("head_dim", head_dim)
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
        "rms_norm_eps": reader.number("rms_norm_eps", rms_norm_eps, least=0),
        "hidden_act": reader.choice(*hidden_act, ACTIVATIONS),
        "max_position_embeddings": positions,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", tie_word_embeddings),
        "rope_parameters": read_rope(reader, positions, head_dim, **rope_options),
        "sliding_window": sliding_window,
        "layer_types": layer_types,
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Inputs of the attention of a layer that follow from the places of the tokens."""

    cos_sin: tuple[jax.Array, jax.Array]  # each (b, t, 1, h)
    masks: Any  # of every block of keys: (b, t, s), or the `Sight` of a fused kernel
    real: jax.Array  # (b, t): no padding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Sums over the tokens that a layer's router sent to its experts."""

    load: jax.Array  # (experts,): how often each was chosen
    probabilities: jax.Array  # (experts,)
    tokens: jax.Array  # ()


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions. Families that make queries, keys and values in
    another way have a `project` of their own.
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

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (b, t, n, h), keys and values (b, t, k, h), before they are rotated."""
        return self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def heads(self, x: jax.Array) -> jax.Array:
        """(b, t, heads * h) -> (b, t, heads, h)."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def __call__(self, x: jax.Array, context: Context, past: Past) -> tuple[jax.Array, Any]:
        """x (b, t, d) -> y, and the new keys and values (b, k, t, h)."""
        q, k, v = self.project(x)
        q, k = rotate(q, context.cos_sin), rotate(k, context.cos_sin)
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        mixed = attend(q, new, past, context.masks, self.scale, self.softcap)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), new


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, *, use_bias: bool = False, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, use_bias=use_bias, rngs=rngs)
        self.up_proj = Linear(d, f, use_bias=use_bias, rngs=rngs)
        self.down_proj = Linear(f, d, use_bias=use_bias, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Norms before attention and MLP. A family gives the two, and may arrange them otherwise."""

    def __init__(self, config: DecoderConfig, attention: Any, mlp: Any, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = mlp

    def __call__(self, x: jax.Array, context: Context, past: Past) -> tuple[jax.Array, Any, Any]:
        y, new = self.self_attn(self.input_layernorm(x), context, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), new, None


class Decoder(nnx.Module):
    def __init__(self, config: Any, block: Callable, norm: Callable, *, rngs: nnx.Rngs):
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.vmap(lambda own: block(config, rngs=own))(
            rngs.split(config.num_hidden_layers)
        )
        self.norm = norm(config.hidden_size, config.rms_norm_eps, rngs=rngs)


class CausalLM(nnx.Module):
    """Embedding, blocks, norm and output head. `block(config, rngs=...)` makes one layer, which
    returns its output, its new keys and values, and its `Routing` if it has experts.
    """

    def __init__(
        self, config: DecoderConfig, block: Callable, norm: Callable = RMSNorm, *, rngs: nnx.Rngs
    ):
        self.config: Any = config  # the family's
        self.model = Decoder(config, block, norm, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """(b, t) -> (b, t, d)."""
        return self.model.embed_tokens(tokens).astype(dtype)

    def hidden(self, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Cache | None]:
        """The first two of what `hidden_and_routing` returns."""
        return self.hidden_and_routing(tokens, **inputs)[:2]

    def hidden_and_routing(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        lengths: jax.Array | None = None,
        cache: Cache | None = None,
        prefix: Virtual | None = None,
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
        kernel: str = "xla",
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        """Final hidden states (b, t, d) of tokens (b, t), the cache with them written if one is
        given, and how every layer's router spread the tokens, if there are experts. For a `Prompt`
        every text of the batch begins with places for it.

        `lengths` (b, t) of the texts that the tokens belong to choose the rotary frequencies of
        dynamic and longrope. The default is the length up to the last of these tokens: give them
        for a chunk of a text that goes on, as the cache keeps the frequencies it was written with.
        """
        config = self.config
        if lengths is None and config.ropes_by_length:
            lengths = text_lengths(positions, segment_ids)
        x = put_in(self.embed(tokens, compute_dtype), positions, prefix)
        positions = positions + first_position(prefix)
        lengths = None if lengths is None else lengths + first_position(prefix)
        own = by_layer(prefix)
        kinds = sorted(set(config.layer_types))
        windows = {FULL: None, SLIDING: config.sliding_window}
        own_windows = [windows[kind] for kind in kinds]
        beside = [own.visible(positions, window) for window in own_windows] if own else []
        seen = sights(kernel, segment_ids, cache, own_windows, beside)
        contexts = [
            Context(
                rope(positions, config.head_dim, config.rope_parameters[kind], lengths),
                masks,
                segment_ids != 0,
            )
            for kind, masks in zip(kinds, seen, strict=True)
        ]
        which = jnp.asarray([kinds.index(kind) for kind in config.layer_types])
        past = Past(None if cache is None else (cache.keys, cache.values), own)

        def block(x, layer, own):
            past, kind = own
            context = contexts[0]
            if len(contexts) > 1:
                context = jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *contexts)
            x, new, routing = layer(x, context, past)
            return x, (None if cache is None else new, routing)

        x, (new, routing) = scan_layers(block, self.model.layers, x, (past, which), remat)
        cache = None if cache is None else cache.write(new[0], new[1], segment_ids)
        return self.model.norm(x), cache, routing

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., d) -> (..., vocab) in the dtype of `hidden`."""
        return (
            self.model.embed_tokens.attend(hidden)
            if self.config.tie_word_embeddings
            else self.lm_head(hidden)
        )
