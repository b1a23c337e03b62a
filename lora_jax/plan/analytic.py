"""Memory of a train step from shapes alone.

    estimate(program)      bytes on each device, by kind
    worked(parameters)     bytes of a model of so many parameters, however it is trained

Arguments and outputs are exact. Temporaries are what stands in memory at the two widest points of
the program: where the logits of a chunk are, and inside the backward pass of one layer. The counts
of arrays there are read off the program of a decoder block, not fitted; what a compiler rearranges
they do not know.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import sharding, tree
from lora_jax.config import AdapterConfig, Config
from lora_jax.models.common import Model
from lora_jax.nn import kernels
from lora_jax.plan.program import Program, build, device_bytes, device_numbers, host_bytes
from lora_jax.quantize import BLOCK, GROUP
from lora_jax.targets import find_targets

NF4_BITS = 4 + 8 / BLOCK + 32 / (BLOCK * GROUP)  # of a weight: its code and its share of the scales


@dataclass(frozen=True)
class Worked:
    """Bytes of a model of `parameters` weights, by what is trained."""

    parameters: float
    weights: float  # in 16 bits; a frozen base too
    full: float  # weights and gradients in 16 bits, two moments of Adam in 32
    full_masters: float  # and weights in 32 bits beside them
    four_bits: float  # a frozen base in 4 bits
    nf4: float  # a frozen base in NF4, with its constants after double quantisation


def worked(parameters: float) -> Worked:
    """The bytes of a model of so many parameters."""
    return Worked(
        parameters=parameters,
        weights=2 * parameters,
        full=(2 + 2 + 4 + 4) * parameters,
        full_masters=(2 + 2 + 4 + 4 + 4) * parameters,
        four_bits=parameters * 4 / 8,
        nf4=parameters * NF4_BITS / 8,
    )


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device."""

    base: int
    adapters: int
    optimizer: int
    batch: int
    outputs: int  # adapters, optimizer and metrics; all but the metrics in place of the arguments
    gradients: int  # and the old moments, kept until the step is known to be sound
    weights: int  # copies of the base in another dtype, made once a step
    kept: int  # of every layer, for its backward pass
    layer: int  # inside the backward pass of one layer
    logits: int  # of one chunk, with what the loss needs beside them
    unread: int  # of the base: weights that others take the place of; no arguments, yet there
    host: int  # in the memory of the host

    @property
    def arguments(self) -> int:
        """Of the compiled step."""
        return self.base - self.unread + self.adapters + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        """The logits are gone when the backward pass of the layers begins."""
        return self.gradients + self.weights + self.kept + max(self.layer, self.logits)

    @property
    def total(self) -> int:
        return self.arguments + self.unread + self.temporaries


@dataclass(frozen=True)
class Sizes:
    """Bytes of the arrays of a micro-batch on one device; a projection is split over `tensor`."""

    number: int  # of one number
    stream: int  # (tokens, d)
    split: int  # the same between layers, its tokens split over `tensor`
    queries: int  # (tokens, n h)
    keys: int  # (tokens, k h)
    ffn: int  # (tokens, f), f of all experts that a token goes through
    scores: int  # (rows, n, time, time), in float32; 0 of a fused kernel
    ranks: int  # (tokens, r), of all modules with adapters
    inputs: int  # of all modules with adapters
    chunk: int  # tokens whose logits stand in memory at once, of all devices
    layers: int
    tensor: int


def sizes(program: Program, platform: str = "tpu") -> Sizes:
    """Of one micro-batch on one device."""
    config, c, mesh = program.config, program.model.config, program.mesh.shape
    rows, time = config.train.micro_batch_size or config.train.batch_size, config.data.max_length
    parts, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    number = 4 if _widens(platform) or config.train.compute_dtype == "float32" else 2
    tokens = rows // parts * time

    def split(features: int) -> int:
        return features // tensor if features % tensor == 0 else features

    chosen = getattr(c, "num_experts_per_tok", 1)
    ffn = getattr(c, "moe_intermediate_size", c.intermediate_size)
    heads = split(c.num_attention_heads)
    targets = find_targets(program.model.params, config.adapter)
    adapted = [(target.shape[0], target.rank) for target in targets if target.stacked]
    return Sizes(
        number=number,
        stream=tokens * c.hidden_size * number,
        split=tokens * c.hidden_size * number // tensor,
        queries=tokens * split(c.num_attention_heads * c.head_dim) * number,
        keys=tokens * split(c.num_key_value_heads * c.head_dim) * number,
        ffn=tokens * split(ffn) * chosen * number,
        scores=0 if _is_fused(program, platform) else rows // parts * heads * time * time * 4,
        ranks=tokens * sum(rank for _, rank in adapted) * number,
        inputs=tokens * sum(features for features, _ in adapted) * number,
        chunk=rows * max(1, min(time, config.train.loss_chunk // rows)),
        layers=c.num_hidden_layers,
        tensor=tensor,
    )


def _widens(platform: str) -> bool:
    """Whether the compiler multiplies in float32 whatever it is given, as that of CPUs does with
    jax 0.10 (not with 0.12): activations are converted, and the matrices before the loop.
    """
    return platform == "cpu" and jax.__version_info__ < (0, 12)


def _is_fused(program: Program, platform: str) -> bool:
    """Whether attention never holds the scores of all pairs."""
    settings = program.config.train
    if platform == "cpu" or program.config.adapter.trains_prefix:
        return False
    if platform == "tpu":
        return settings.attention != "xla"
    config, dtype = program.model.config, settings.compute_dtype
    return kernels.choose(settings.attention, config, dtype, jax.devices()[0]) != "xla"


def estimate(program: Program, platform: str = "tpu") -> Estimate:
    """What a step takes on each device of a `platform`: tpu, gpu or cpu."""
    s = sizes(program, platform)
    state = (program.adapters, program.optimizer)
    metrics = program.metrics_bytes
    gradients = _shared(program.adapters)
    return Estimate(
        base=device_bytes(program.base),
        adapters=device_bytes(program.adapters),
        optimizer=device_bytes(program.optimizer),
        batch=device_bytes(program.batch) + (device_bytes(program.key) if program.needs_key else 0),
        # A table of addresses is an output of its own.
        outputs=device_bytes(state) + metrics + 8 * (len(jax.tree.leaves(state)) + metrics // 4),
        gradients=gradients + device_bytes(program.optimizer) + host_bytes(program.optimizer),
        weights=_converted(program) if _widens(platform) else 0,
        kept=_kept(program, s),
        layer=_layer(program, s),
        logits=_logits(program, s),
        unread=device_bytes(program.unread),
        host=host_bytes(program.optimizer),
    )


def _shared(adapters: Any) -> int:
    """Bytes of the gradients, as they begin: zeros, of which arrays of one shape share theirs."""
    leaves = {(leaf.shape, leaf.sharding.spec): leaf for leaf in jax.tree.leaves(adapters)}
    return device_bytes(list(leaves.values()))


@dataclass(frozen=True)
class _Block:
    """What a layer does beside a Llama layer, or otherwise."""

    act: int  # arrays (tokens, f) that the activation and its derivative are made of
    gated: bool  # act(gate) * up
    norms: int  # beyond the two before attention and MLP
    head_norms: bool  # of queries and keys
    softcap: bool  # scores are bent
    experts: int  # that a token goes through; 0: an MLP


_PARTS = {"gelu": 4, "gelu_new": 5, "gelu_pytorch_tanh": 5}  # by erf; by tanh of a polynomial


def _block(model: Model) -> _Block:
    c = model.config
    inside = [path for path in tree.flatten(model.params) if tree.stack_position(path) is not None]
    heads = [path for path in inside if path[-2] in ("q_norm", "k_norm")]
    norms = [path for path in inside if path[-1] == "scale" and path not in heads]
    return _Block(
        act=_PARTS.get(getattr(c, "hidden_act", "gelu_new"), 3),
        gated=any("gate" in part for path in inside for part in path),
        norms=len(norms) - 2,
        head_norms=bool(heads),
        softcap=getattr(c, "attn_logit_softcapping", None) is not None,
        experts=getattr(c, "num_experts_per_tok", 0),
    )


def _kept(program: Program, s: Sizes) -> int:
    """What the forward pass leaves for the backward pass, of all layers."""
    b = _block(program.model)
    match program.config.train.remat:
        case "none":
            own = s.ranks + _residuals(b, s) + (2 if b.gated else 0) * s.ffn
            own += 2 * b.experts * s.stream
            copies = _experts(program) if b.experts else 0  # each loop over blocks keeps its matrix
            return s.layers * (own + copies)
        case "dots":
            # The products of queries, keys, values, output, gate and up with the base, and with
            # the adapters beside it; nothing reads that of down, and those of experts are no dots.
            products = s.queries + 2 * s.keys + s.stream
            products += 0 if b.experts else (1 + b.gated) * s.ffn
            return s.layers * (s.split + (2 if s.ranks else 1) * products + s.ranks)
    return s.layers * s.split  # with `offload`, the products are in the memory of the host


def _residuals(b: _Block, s: Sizes) -> int:
    """Inputs, norms and residual sums of a layer; queries, keys, values; probabilities, whole and
    in the dtype of the products; what the activation leaves, and the input of the last projection.
    """
    total = 2 * s.stream + (5 + b.norms) * s.split + (2 + 2 * b.head_norms) * s.queries
    total += (2 + 2 * b.head_norms) * s.keys + (b.act + 1) * s.ffn
    return total + 2 * s.scores + (2 * s.scores + s.scores // 4 if b.softcap else 0)


def _layer(program: Program, s: Sizes) -> int:
    """What stands in memory where the backward pass of a layer is widest: in its MLP, with the
    residuals of attention before it.
    """
    config, b = program.config, _block(program.model)
    # Gradients of the activation's parts beside its residuals, where these are not kept already;
    # and of the three projections, what their adapters add to them.
    beside = 1 + 2 * b.gated if s.ranks else 0
    wide = {"none": 4, "full": b.act + 1 + 2 * b.gated + beside}.get(
        config.train.remat, b.act + 3 * b.gated
    )
    total = wide * s.ffn + 2 * s.stream + (3 + b.norms) * s.split + s.ranks
    total += (2 + b.head_norms) * (s.queries + s.keys)
    # Scores and probabilities; on one device also the mask as wide as they are, which a program
    # for several makes as it goes.
    masks = program.mesh.size == 1 and config.train.remat != "none"
    total += (2 + masks + (b.softcap and config.train.remat != "none")) * s.scores
    if b.experts:
        total += 6 * b.experts * s.stream + _experts(program)
    else:
        total += 2 * max(_matrices(program), default=0) // s.tensor * s.number
    if config.adapter.use_dora:  # the product before its gain, at every module
        total += s.ffn + 4 * s.stream
    if config.adapter.dropout and config.train.remat != "none":
        total += 2 * s.inputs + s.inputs // s.number * 4  # what is left, its gradient, random bits
    return total


def _experts(program: Program) -> int:
    """The matrices of all experts of a layer, taken out of the stack."""
    numbers = sum(
        math.prod(leaf.shape[1:])
        for path, leaf in tree.flatten(program.model.params).items()
        if path[-1] == "kernel" and tree.has_experts(path)
    )
    return numbers // program.mesh.shape["tensor"] * sizes(program).number


def _logits(program: Program, s: Sizes) -> int:
    """What stands in memory with the logits of a chunk: they and their gradient in float32, the
    head as it is multiplied with, and final states, their gradient and both in chunks.
    """
    leaves, mesh = tree.flatten(program.model.params), program.mesh.shape
    path = tree.tied_embedding(program.model.params) or ("lm_head", "kernel")
    vocabulary = len(program.model.labels)
    if path in leaves:
        vocabulary = program.model.config.vocab_size
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        rows, columns = sharding.logits_axes(vocabulary)
    parts = _size(mesh, columns)
    parts = parts if vocabulary % parts == 0 else 1
    logits = s.chunk // _size(mesh, rows) * (vocabulary // parts) * 4
    total = 4 * s.split + 2 * logits
    if path in leaves:
        # Converted, where it is multiplied with in another dtype, or laid out anew.
        part = math.prod(leaves[path].shape) // parts
        moved = mesh["fsdp"] > 1 or leaves[path].dtype.itemsize != s.number
        total += part * s.number if moved else 0
    return total


def _size(mesh: Mapping[str, int], axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def _matrices(program: Program) -> Iterable[int]:
    """Numbers of the matrices of one layer."""
    for path, leaf in tree.flatten(program.model.params).items():
        if path[-1] == "kernel" and tree.stack_position(path) is not None:
            yield math.prod(leaf.shape[tree.lead_axes(path) :])


def layer_weights(program: Program) -> int:
    """Numbers of all matrices of one layer that a device multiplies with, gathered."""
    total = 0
    for path, leaf in tree.flatten(program.model.params).items():
        if path[-1] == "kernel" and tree.stack_position(path) is not None:
            total += math.prod(leaf.shape[1:])
    return total // program.mesh.shape["tensor"]


def _converted(program: Program) -> int:
    """Copies in float32 of matrices, made before the loops over layers and pieces."""
    train = program.config.train
    pieces = train.batch_size // (train.micro_batch_size or train.batch_size)
    return 4 * sum(
        device_numbers(leaf)
        for path, leaf in tree.flatten(program.base).items()
        if isinstance(leaf, jax.ShapeDtypeStruct)
        and leaf.dtype.itemsize == 2
        and (path[-1] == "kernel" and tree.stack_position(path) is not None)
        | (path[-1] in ("kernel", "embedding") and pieces > 1)
    )


def full_fine_tuning(config: Config, model: Model, mesh: Any, platform: str = "tpu") -> Estimate:
    """The same step with every weight trained, in float32."""
    dtype = config.base_dtype if config.base_dtype in ("float32", "bfloat16") else None
    full = dataclasses.replace(config, adapter=AdapterConfig(method="full"), base_dtype=dtype)
    return estimate(build(full, model, mesh), platform)
