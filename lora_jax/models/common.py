"""Parts that every family shares: the `Model` value, names of tensors in files, the layer scan."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from lora_jax import weights
from lora_jax.errors import UserError
from lora_jax.nn.cache import ATTENTION as ATTENTION
from lora_jax.nn.cache import Cache, CacheShape, Heads, cached_layers, kv_shapes
from lora_jax.nn.virtual import Virtual, placeholders
from lora_jax.sharding import Rules, constrain_stream
from lora_jax.tree import check_parameters, dotted, flatten, summarize


def scan_layers(
    block: Callable,
    layers: nnx.Module,
    x: jax.Array,
    per_layer: Any,
    remat: str,
    cache: tuple[Any, jax.Array] | None = None,
    first: int = 0,
) -> tuple[jax.Array, Any, Any]:
    """Run `block(x, layer, own, cached) -> (x, out, cached)` over layers: by a scan over stacked
    parameters, unrolled over `Layered` ones.

    Args:
        block: one layer; `own` is its slice of `per_layer`, `cached` its `LayerCache`, or None.
        layers: the module; each parameter has a leading layer axis, or is a `Layered`.
        x: input (b, t, d) of the first layer.
        per_layer: a tree of arrays with a leading layer axis.
        remat: activations kept for the backward pass. none: all of them; dots: results of matrix
            products; full: the input of each layer; offload: the same, in host memory.
        cache: the cache, or its `States`, and the slots (b, t) of the new tokens.
        first: index of the first layer in the cache.

    Returns:
        The output of the last layer, the stacked `out` of all layers, and the cache with the new
        tokens.
    """
    graphdef, state = nnx.split(layers)
    kept, places = (None, None) if cache is None else cache

    def body(carry, slices):
        (x, kept), (state, own, index) = carry, slices
        x = checkpoint_name(constrain_stream(x), "stream")
        cached = None if kept is None else kept.layer(index, places)
        x, out, cached = block(x, nnx.merge(graphdef, state), own, cached)
        return (x, None if kept is None else kept.with_layer(index, cached)), out

    leaves = jax.tree.leaves(state, is_leaf=weights.is_layered)
    if any(map(weights.is_layered, leaves)):
        carry, outs = (x, kept), []
        for index in range(leaves[0].shape[0]):
            own = weights.layer_of((state, per_layer), index)
            carry, out = body(carry, (*own, first + index))
            outs.append(out)
        return carry[0], jax.tree.map(lambda *each: jnp.stack(each), *outs), carry[1]
    body = _remat(body, remat)
    indices = jnp.arange(first, first + leaves[0].shape[0])
    (x, kept), out = jax.lax.scan(body, (x, kept), (state, per_layer, indices))
    return x, out, kept


def run_layers(
    block: Callable, layers: Sequence[nnx.Module], x: jax.Array, remat: str
) -> jax.Array:
    """Run `block(x, layer, index) -> x` over layers of several shapes, each compiled by itself;
    `remat` as in `scan_layers`. Return the output (b, t, d) of the last layer.
    """
    for index, layer in enumerate(layers):
        graphdef, state = nnx.split(layer)

        def body(x: jax.Array, state: Any, graphdef: Any = graphdef, index: int = index):
            x = checkpoint_name(constrain_stream(x), "stream")
            return block(x, nnx.merge(graphdef, state), index)

        x = _remat(body, remat, prevent_cse=True)(x, state)
    return x


def _remat(body: Callable, remat: str, prevent_cse: bool = False) -> Callable:
    """Return a layer with the activations of `remat` kept; the body of a scan needs no
    `prevent_cse`.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "full":
            return jax.checkpoint(body, prevent_cse=prevent_cse)
        case "dots":
            policy = policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)
        case "offload":
            keep = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["stream"],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return jax.checkpoint(body, prevent_cse=prevent_cse, policy=keep)
    return body


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass that change its cost and rounding, and nothing else."""

    dtype: Any = jnp.float32  # of activations
    remat: str = "none"  # none | dots | full | offload: see `scan_layers`
    kernel: str = "xla"  # of attention: one of `kernels.NAMES`


PLAIN = Execution()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Sums over the real tokens of a layer's router."""

    load: jax.Array  # (experts,) number of tokens sent to each
    probabilities: jax.Array  # (experts,) sum of the probabilities given to each
    tokens: jax.Array  # () number of tokens


@dataclass(frozen=True)
class Names:
    """Names of tensors in the files of a family, where they differ from the paths of its tree."""

    base: str = "model."  # prefix that files of the model without its head leave out
    no_weights: str = r".*rotary_emb\.inv_freq"  # regex of tensors that are not weights
    renamed: tuple[tuple[str, str], ...] = ()  # text in a module path -> text in the file
    old: tuple[tuple[str, str], ...] = ()  # suffix of a name in old files -> suffix today
    # Parts of a stack of experts, joined along out; none: files hold the stack as one tensor.
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()  # modules that files may lack; they start at random and train
    moved: tuple[tuple[str, str], ...] = ()  # start of a name in other files -> start today
    carried: tuple[str, ...] = ()  # modules whose tensors are not read; an export copies them

    def without(self, unread: str) -> "Names":
        """Return the names with one more regex of tensors that are not weights; "" for none."""
        if not unread:
            return self
        return dataclasses.replace(self, no_weights=f"{self.no_weights}|{unread}")


@dataclass(frozen=True)
class Model:
    """A model as a value: a static structure and a tree of frozen parameters, arrays or shapes."""

    graphdef: Any
    template: Any  # NNX state of shapes, the form that `graphdef` is merged with
    params: dict
    config: Any  # the family's Config
    hf_config: dict[str, Any]  # content of config.json
    rules: Rules
    names: Names = Names()
    directory: Path = Path()  # of its files
    fresh: tuple[str, ...] = ()  # those of `names.heads` that start at random
    notes: tuple[str, ...] = ()  # on fields of config.json that are not read as written

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of a classifier; empty for a model that generates text."""
        return getattr(self.config, "labels", ())

    @property
    def learned_positions(self) -> int | None:
        """Largest number of tokens of a text with learned positions; None for other positions."""
        return getattr(self.config, "learned_positions", None)

    def check_tokens(self, tokens: Any, what: str = "tokens") -> None:
        """Check that tokens are ids of the vocabulary.

        Raises:
            UserError: tokens that are not integers, negative, or not below the vocabulary size.
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
        """Return the NNX module with `params` (plain, bound or merged); it has methods `hidden` and
        `logits`.

        Raises:
            UserError: adapters in place of parameters, or a tree with other paths than the model.
        """
        call = (
            "a model runs on parameters, model.apply(lora.bind(params, adapters, config), tokens)"
        )
        check_parameters(params, call)
        want, have = flatten(nnx.to_pure_dict(self.template)), flatten(params)
        lists = {"missing": want.keys() - have.keys(), "unexpected": have.keys() - want.keys()}
        problems = [f"{what} {dotted(path)}" for what in lists for path in sorted(lists[what])]
        if problems:
            raise UserError("these are not the parameters of the model: " + summarize(problems))
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
        """Return logits (b, t, vocab) of tokens (b, t); for a classifier (b, t, labels), the same
        at all tokens of a text.

        Args:
            params: plain, bound or merged parameters.
            tokens: (b, t) int32.
            positions: (b, t) int32 from 0, within each text; by default within the row.
            segment_ids: (b, t) int32, the text of each token, 0 for padding; by default each row is
                one text.
            prefix: virtual tokens (`lora.prefix`) before each row. The placeholders of a `Prompt`
                are added here; with segment_ids or positions the batch must have them.
            compute_dtype: dtype of activations.
            return_hidden: also return hidden states (b, t, d), the output of the last layer after
                the final norm (`last_hidden_state` of transformers); for a classifier, the input
                of its last linear. Inside `jit`, logits that are not used cost nothing.
            inputs: for a classifier, `token_types` (b, t).

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
            execution=Execution(compute_dtype),
            **inputs,
        )
        hidden = hidden[:, inserted:]
        logits = module.logits(hidden)
        return (logits, hidden) if return_hidden else logits

    @property
    def cache_shape(self) -> CacheShape:
        """Return the sizes of a cache."""
        c = self.config
        others = c.num_hidden_layers - len(attention_heads(c))
        heads = tuple(Heads(len(own), *shape) for shape, own in cached_layers(c).items())
        return CacheShape(heads, others, c.state_shapes if others else ())

    def empty_cache(self, rows: int, slots: int, dtype: Any) -> Cache:
        """Return an empty cache for `rows` texts of up to `slots` tokens: one array per layer if
        the parameters are `Layered`.
        """
        leaves = jax.tree.leaves(self.params, is_leaf=weights.is_layered)
        shape = self.cache_shape
        make = shape.empty_layers if any(map(weights.is_layered, leaves)) else shape.empty
        return make(rows, slots, dtype)

    def replace(self, **changes: Any) -> "Model":
        """Return the model with some fields changed."""
        return dataclasses.replace(self, **changes)


def attention_heads(config: Any) -> list[tuple[int, int]]:
    """Return the number of key and value heads and their size in each layer with attention; the
    other layers keep a state.
    """
    mixers = getattr(config, "mixers", None)  # of families over `DecoderConfig`
    shapes = kv_shapes(config)
    return [own for i, own in enumerate(shapes) if mixers is None or mixers[i] == ATTENTION]


def has_states(config: Any) -> bool:
    """Return True if some layers pass a state from token to token."""
    return len(attention_heads(config)) < config.num_hidden_layers


def foreign_token(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Return the first token outside of 0 to `vocab_size` - 1; None if there is none."""
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    return int(outside[0]) if outside.size else None


def _keys_like(params: Mapping) -> dict:
    return {
        key: _keys_like(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }
