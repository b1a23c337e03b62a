"""Inputs of layers that follow from positions and segments, by the kind of the layer.

Layers of one kind in `layer_types` have the same window and rotations. A stack whose layers are of
several kinds chooses among them by the layer; a run of layers of one kind has them as they are.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.reader import SLIDING
from lora_jax.nn.attention import mask_specs
from lora_jax.nn.cache import Cache
from lora_jax.nn.rope import rope
from lora_jax.nn.texts import Texts
from lora_jax.nn.virtual import Prefix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of a layer that depend on positions and segments only, not on hidden states."""

    cos_sin: tuple[jax.Array, jax.Array]  # each (b, t, 1, h)
    masks: Any  # (b, t, s) for each block of keys, or the `MaskSpec` of a fused kernel
    real: jax.Array  # (b, t) bool; False for padding
    positions: jax.Array  # (b, t), virtual tokens included
    texts: Texts
    per_layer: Any = None  # what a family gives to this layer alone


@dataclass(frozen=True)
class KindInputs:
    """Inputs of the layers of each kind."""

    layer_types: tuple[str, ...]  # by layer
    each: dict[str, tuple[Any, Any]]  # rotations and masks, by kind
    positions: jax.Array  # (b, t), virtual tokens included
    texts: Texts

    @classmethod
    def of(
        cls, config: Any, texts: Texts, positions: jax.Array, lengths: jax.Array | None
    ) -> "KindInputs":
        """Return the inputs without masks."""
        found = {}
        for kind in sorted({*config.layer_types}):
            _, size = config.kv_shapes[config.layer_types.index(kind)]
            found[kind] = (rope(positions, size, config.rope_parameters[kind], lengths), None)
        return cls(config.layer_types, found, positions, texts)

    def with_masks(
        self, config: Any, kernel: str, cache: Cache | None, prefix: Prefix | None
    ) -> "KindInputs":
        """Return the inputs with masks of the tokens, of the slots of a cache and of a prefix."""
        window = config.sliding_window
        windows = [window if kind.startswith(SLIDING) else None for kind in self.each]
        of_prefix = [prefix.visible(self.positions, own) for own in windows] if prefix else []
        masks = mask_specs(kernel, self.texts, cache, windows, of_prefix)
        pairs = zip(self.each.items(), masks, strict=True)
        return replace(self, each={kind: (own, mask) for (kind, (own, _)), mask in pairs})

    def kinds_of(self, layers: tuple[int, int]) -> tuple[list[str], jax.Array]:
        """Return the kinds of layers from the first to before the second, and the index of each
        layer's kind among them.
        """
        own = self.layer_types[slice(*layers)]
        present = sorted({*own})
        return present, jnp.asarray([present.index(kind) for kind in own])

    def choose(self, present: list[str], which: jax.Array, per_layer: Any) -> AttentionInputs:
        """Return the inputs of a layer, whose kind is `present[which]`."""
        found = [self.each[kind] for kind in present]
        cos_sin, masks = found[0]
        if len(found) > 1:
            chosen = jax.tree.map(lambda *each: jax.lax.select_n(which, *each), *found)
            cos_sin, masks = chosen
        real = self.texts.segment_ids != 0
        return AttentionInputs(cos_sin, masks, real, self.positions, self.texts, per_layer)
