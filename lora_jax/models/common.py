"""What every family shares: the scan over stacked layers, and the `Model` value."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.layers import Cache, empty_cache
from lora_jax.sharding import Rules


def scan_layers(
    block: Callable, layers: nnx.Module, x: jax.Array, cached: Any, remat: str
) -> tuple[jax.Array, Any]:
    """Run `block(x, layer, cached) -> (x, out)` over stacked layers; `remat` says what the backward
    pass keeps.
    """
    graphdef, state = nnx.split(layers)

    def body(x, slices):
        state, cached = slices
        return block(x, nnx.merge(graphdef, state), cached)

    policies = jax.checkpoint_policies
    match remat:
        case "full":
            body = jax.checkpoint(body, prevent_cse=False)
        case "dots":
            body = jax.checkpoint(
                body, prevent_cse=False, policy=policies.dots_with_no_batch_dims_saveable
            )
        case "offload":
            keep = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
            body = jax.checkpoint(body, prevent_cse=False, policy=keep)
    return jax.lax.scan(body, x, (state, cached))


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
    directory: Path = Path()  # where its files are

    def module(self, params: Mapping) -> Any:
        """The NNX module over `params` (plain, bound or merged), with methods `hidden` and
        `logits`.
        """
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
        compute_dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Logits (b, t, vocab) of tokens (b, t). Without segment_ids all tokens of a row are one
        text.
        """
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        module = self.module(params)
        hidden, _ = module.hidden(
            tokens, positions=positions, segment_ids=segment_ids, compute_dtype=compute_dtype
        )
        return module.logits(hidden)

    def empty_cache(self, rows: int, slots: int, dtype: Any) -> Cache:
        """A cache for `rows` texts of up to `slots` tokens."""
        c = self.config
        return empty_cache(
            c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim, dtype
        )

    def replace(self, **changes: Any) -> "Model":
        return dataclasses.replace(self, **changes)


def _keys_like(params: Mapping) -> dict:
    return {
        key: _keys_like(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }
