"""Operations of a step, what it sends, and the least time that a chip needs: a roofline (Williams,
Waterman and Patterson, 2009).

Counted from shapes: `cost_analysis` of a compiled program counts the body of a loop once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax import tree
from lora_jax.models.common import attention_heads
from lora_jax.plan.analytic import Estimate, layer_weights, sizes
from lora_jax.plan.chips import Chip
from lora_jax.plan.program import Program, device_bytes, device_numbers


@dataclass(frozen=True)
class Step:
    """Work of one step, over all devices."""

    tokens: int
    model_flops: int  # operations without recomputation
    flops: int  # operations with recomputation
    gathered: int  # bytes of weights that a device receives from others
    reduced: int  # bytes of activations and gradients that it sends


@dataclass(frozen=True)
class Roofline:
    """Least seconds of a step by each bound, at the peaks of a chip."""

    compute: float
    memory: float
    network: float
    mfu: float  # share of the peak that the model's operations would reach in `seconds`

    @property
    def seconds(self) -> float:
        """Least seconds of a step, if computation, memory and network overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """The bound that takes longest: compute, memory or network."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(times, key=lambda name: times[name])


def count(program: Program) -> Step:
    """Count the work of a step: two operations per weight and token forward, the same backward for
    activations, and again for a trained weight. Full remat runs the layers forward once more.
    """
    config, c = program.config, program.model.config
    tokens = config.train.batch_size * config.data.max_length
    leaves = tree.flatten(program.model.params)
    layers, head = _products(program)
    if tree.tied_embedding(leaves) is not None:
        head += c.vocab_size * c.hidden_size
    width = c.num_attention_heads * sum(head_dim for _, head_dim in attention_heads(c))
    attention = tokens * 4 * config.data.max_length * width
    tied = tree.tied_embedding(leaves) is not None
    adapters = tree.flatten(program.adapters)
    targets = program.trainable.targets
    low_rank = sum(math.prod(t.lead) * t.rank * sum(t.shape) for t in targets)
    # Weights that train themselves; an embedding that is only looked up has no products.
    whole = _numbers(adapters, ("full_kernel", "full_embedding") if tied else ("full_kernel",))
    forward = attention + tokens * 2 * (layers + low_rank)
    backward = 2 * attention + tokens * (2 * layers + 4 * low_rank + 2 * whole)
    again = {"full": forward, "none": 0}.get(config.train.remat, attention)
    model_flops = forward + backward + tokens * 2 * 2 * head
    return Step(tokens, model_flops, model_flops + again, _gathered(program), _reduced(program))


def _numbers(leaves: Mapping[tree.Path, Any], names: tuple[str, ...]) -> int:
    return sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path[-1] in names)


def _products(program: Program) -> tuple[int, int]:
    """Return the numbers of weights that each token is multiplied with: in the layers, and in an
    untied head.
    """
    layers = head = 0
    for path, leaf in tree.flatten(program.model.params).items():
        if path[-1] != "kernel":
            continue
        size = math.prod(leaf.shape)
        if tree.has_experts(path):
            chosen = program.model.config.num_experts_per_tok
            size = size * chosen // leaf.shape[tree.lead_axes(path) - 1]
        if tree.in_layers(path):
            layers += size
        else:
            head += size
    return layers, head


def _pieces(program: Program) -> int:
    train = program.config.train
    return train.batch_size // (train.micro_batch_size or train.batch_size)


def _gathered(program: Program) -> int:
    """Bytes of weights that a device receives: over the fsdp axis, all layers, embedding and head
    are gathered once forward and once backward, in their stored dtype.
    """
    parts = program.mesh.shape["fsdp"]
    weights = program.adapters if program.config.adapter.trains_everything else program.base
    stored = device_bytes(weights)
    return _pieces(program) * 2 * stored * (parts - 1)


def _reduced(program: Program) -> int:
    """Bytes that a device sends for sums: the two outputs of each layer over the tensor axis,
    forward, backward and in recomputation; and the adapters' gradients over data and fsdp.
    """
    s, mesh = sizes(program), program.mesh.shape
    passes = 3 if program.config.train.remat == "full" else 2
    share = 2 * (s.tensor - 1) / s.tensor  # of an all-reduce in a ring
    streams = _pieces(program) * passes * 2 * s.layers * s.stream * share
    parts = mesh["data"] * mesh["fsdp"]
    leaves = tree.flatten(program.adapters).values()
    gradients = 4 * sum(device_numbers(leaf) for leaf in leaves) * 2 * (parts - 1) / parts
    return round(streams + _pieces(program) * gradients)


def find_bounds(program: Program, chip: Chip, found: Estimate, sent: int | None = None) -> Roofline:
    """Return the bounds of a step on `chip`; `sent` are the bytes that a device sends, if the step
    was compiled.
    """
    step, s = count(program), sizes(program)
    passes = 3 if program.config.train.remat == "full" else 2
    # Each pass reads the weights of all layers, and writes and reads the activations between
    # products; scores are not counted, as a fused kernel does not store them.
    between = 8 * s.stream + 2 * s.queries + 2 * s.keys + 6 * s.ffn
    traffic = passes * s.layers * (layer_weights(program) * s.number + 2 * between)
    traffic *= _pieces(program)
    traffic += 2 * found.adapters + 3 * found.optimizer
    compute = step.flops / program.mesh.size / chip.flops
    memory = traffic / chip.hbm_bandwidth
    network = (step.gathered + step.reduced if sent is None else sent) / chip.ici_bandwidth
    seconds = max(compute, memory, network)
    mfu = step.model_flops / program.mesh.size / chip.flops / seconds
    return Roofline(compute, memory, network, mfu)
