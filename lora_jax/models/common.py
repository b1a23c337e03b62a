"""Parts that every family shares: the `Model` value, names of tensors in files, the layer scan."""

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

from lora_jax.errors import UserError
from lora_jax.nn.cache import Cache, empty_cache
from lora_jax.nn.virtual import Virtual, placeholders
from lora_jax.sharding import Rules, constrain_stream
from lora_jax.tree import check_parameters, dotted, flatten, summarize


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
