"""The MLPs of decoders: with a gate, and without."""

from typing import Any

import jax
from flax import nnx

from lora_jax.nn.modules import ACTIVATIONS, Linear
from lora_jax.shared_input import share


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202), with the family's names of the linears."""

    def __init__(
        self,
        config: Any,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        d, f = config.hidden_size, config.intermediate_size
        setattr(self, names[0], Linear(d, f, use_bias=use_bias, rngs=rngs))
        setattr(self, names[1], Linear(d, f, use_bias=use_bias, rngs=rngs))
        setattr(self, names[2], Linear(f, d, use_bias=use_bias, rngs=rngs))
        self.names, self.act = names, config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        x, (gate, up, down) = share(x), (getattr(self, name) for name in self.names)
        return down(ACTIVATIONS[self.act](gate(x)) * up(x))


class PlainMLP(nnx.Module):
    """down(act(up(share(x)))), with the family's names of the two linears."""

    def __init__(
        self,
        config: Any,
        names: tuple[str, str] = ("up_proj", "down_proj"),
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        d, f = config.hidden_size, config.intermediate_size
        setattr(self, names[0], Linear(d, f, use_bias=use_bias, rngs=rngs))
        setattr(self, names[1], Linear(f, d, use_bias=use_bias, rngs=rngs))
        self.names, self.act = names, config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        up, down = (getattr(self, name) for name in self.names)
        return down(ACTIVATIONS[self.act](up(share(x))))
