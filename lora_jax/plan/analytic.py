"""Memory of a train step from shapes alone.

    estimate(program)      bytes on each device, by kind
    worked(parameters)     bytes of a model with so many parameters, by training method

Arguments and outputs are exact. Temporaries are the arrays in memory at the two largest points of
the program: at the logits of a chunk, and inside the backward pass of one layer. Their numbers are
counted in the program of a decoder layer, not fitted; changes by the compiler are not included.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import sharding, tree
from lora_jax.config import AdapterConfig, Config
from lora_jax.models.common import Model, attention_heads
from lora_jax.nn import kernels
from lora_jax.plan.program import Program, build, device_bytes, device_numbers, host_bytes
from lora_jax.quantize import BLOCK, GROUP

NF4_BITS = 4 + 8 / BLOCK + 32 / (BLOCK * GROUP)  # per weight: its code and its share of the scales


@dataclass(frozen=True)
class Worked:
    """Bytes of a model of `parameters` weights, by what is trained."""

    parameters: float
    weights: float  # in 16 bits; a frozen base too
    full: float  # weights and gradients in 16 bits, two moments of Adam in 32
    full_masters: float  # the same with another copy of the weights in 32 bits
    four_bits: float  # a frozen base in 4 bits
    nf4: float  # a frozen base in NF4, with its constants after double quantisation


def worked(parameters: float) -> Worked:
    """Return the bytes of a model with so many parameters."""
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
    outputs: int  # adapters, optimizer and metrics; the first two reuse the arguments' memory
    gradients: int  # and the old moments, kept until the gradients are known to be finite
    weights: int  # copies of the base in another dtype, made once a step
    kept: int  # activations of all layers that the backward pass needs
    layer: int  # temporaries inside the backward pass of one layer
    logits: int  # of one chunk, with the temporaries of the loss
    unread: int  # base weights that trained ones replace: in memory, but not arguments
    host: int  # in host memory

    @property
    def arguments(self) -> int:
        """Bytes of the arguments of the compiled step."""
        return self.base - self.unread + self.adapters + self.optimizer + self.batch

    @property
    def temporaries(self) -> int:
        """Bytes of temporaries. The logits are freed before the backward pass of the layers."""
        return self.gradients + self.weights + self.kept + max(self.layer, self.logits)

    @property
    def total(self) -> int:
        return self.arguments + self.unread + self.temporaries


@dataclass(frozen=True)
class Sizes:
    """Bytes of the arrays of a micro-batch on one device; projections are split over `tensor`."""

    number: int  # one activation
    stream: int  # (tokens, d)
    split: int  # the same between layers, its tokens split over `tensor`
    queries: int  # (tokens, n h)
    keys: int  # (tokens, k h)
    ffn: int  # (tokens, f), f summed over the experts of a token
    scores: int  # (rows, n, time, time) in float32; 0 with a fused kernel
    ranks: int  # (tokens, r), summed over modules with adapters
    inputs: int  # inputs of all modules with adapters
    chunk: int  # tokens whose logits are in memory at once, over all devices
    layers: int
    tensor: int


def sizes(program: Program, platform: str = "tpu") -> Sizes:
    """Return the sizes for one micro-batch on one device."""
    config, c, mesh = program.config, program.model.config, program.mesh.shape
    rows, time = config.train.micro_batch_size or config.train.batch_size, config.data.max_length
    parts, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    number = 4 if _widens(platform) or config.train.compute_dtype == "float32" else 2
    tokens = rows // parts * time

    def split(features: int) -> int:
        return features // tensor if features % tensor == 0 else features

    chosen = getattr(c, "num_experts_per_tok", 1)
    ffn = getattr(c, "moe_intermediate_size", c.intermediate_size)
    heads, each = split(c.num_attention_heads), attention_heads(c)  # the widest layer counts
    targets = program.trainable.targets
    inside = tree.one_layer({target.weight: None for target in targets})
    adapted = [(one.shape[0], one.rank) for one in targets if one.weight in inside]
    return Sizes(
        number=number,
        stream=tokens * c.hidden_size * number,
        split=tokens * c.hidden_size * number // tensor,
        queries=tokens * split(c.num_attention_heads * max(h for _, h in each)) * number,
        keys=tokens * split(max(k * h for k, h in each)) * number,
        ffn=tokens * split(ffn) * chosen * number,
        scores=0 if _is_fused(program, platform) else rows // parts * heads * time * time * 4,
        ranks=tokens * sum(rank for _, rank in adapted) * number,
        inputs=tokens * sum(features for features, _ in adapted) * number,
        chunk=rows * max(1, min(time, config.train.loss_chunk // rows)),
        layers=c.num_hidden_layers,
        tensor=tensor,
    )


def _widens(platform: str) -> bool:
    """Return True if the compiler multiplies in float32 whatever the dtype, as for CPUs with jax
    0.10 (not 0.12): activations are converted, and matrices before the loop over layers.
    """
    return platform == "cpu" and jax.__version_info__ < (0, 12)


def _is_fused(program: Program, platform: str) -> bool:
    """Return True if attention uses a fused kernel, without the scores of all pairs in memory."""
    settings = program.config.train
    if platform == "cpu" or program.config.adapter.trains_prefix:
        return False
    if platform == "tpu":
        return settings.attention != "xla"
    config, dtype = program.model.config, settings.compute_dtype
    return kernels.choose(settings.attention, config, dtype, jax.devices()[0]) != "xla"


def estimate(program: Program, platform: str = "tpu") -> Estimate:
    """Estimate the memory of a step on each device of a `platform`: tpu, gpu or cpu."""
    s = sizes(program, platform)
    state = (program.adapters, program.optimizer)
    metrics = program.metrics_bytes
    gradients = _shared(program.adapters)
    return Estimate(
        base=device_bytes(program.base),
        adapters=device_bytes(program.adapters),
        optimizer=device_bytes(program.optimizer),
        batch=device_bytes(_read(program)) + (device_bytes(program.key) * program.needs_key),
        # The table of output addresses is an output too.
        outputs=device_bytes(state) + metrics + 8 * (len(jax.tree.leaves(state)) + metrics // 4),
        gradients=gradients + device_bytes(program.optimizer) + host_bytes(program.optimizer),
        weights=_converted(program) if _widens(platform) else 0,
        kept=_kept(program, s),
        layer=_layer(program, s),
        logits=_logits(program, s),
        unread=device_bytes(program.unread),
        host=host_bytes(program.optimizer),
    )


def _read(program: Program) -> dict[str, Any]:
    """Return the arrays of the batch that the step reads: with shared prompts, `seen_until` says
    who sees whom, and only experts ask for segments.
    """
    shares, experts = "seen_until" in program.batch, _block(program.model).experts
    return {
        name: leaf
        for name, leaf in program.batch.items()
        if name != "segment_ids" or experts or not shares
    }


def _shared(adapters: Any) -> int:
    """Bytes of the gradients as zeros at the start, where arrays of the same shape share memory."""
    leaves = {(leaf.shape, leaf.sharding.spec): leaf for leaf in jax.tree.leaves(adapters)}
    return device_bytes(list(leaves.values()))


@dataclass(frozen=True)
class _Block:
    """Features of a layer that affect its memory."""

    act: int  # arrays (tokens, f) of the activation function and its derivative
    gated: bool  # act(gate) * up
    norms: int  # in addition to those before attention and MLP
    head_norms: bool  # norms on queries and keys
    softcap: bool  # on scores
    experts: int  # experts of a token; 0: an MLP


_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_PARTS = {"gelu": 4, "gelu_new": 5, "gelu_pytorch_tanh": 5}  # by erf; by tanh of a polynomial


def _block(model: Model) -> _Block:
    c = model.config
    inside = tree.one_layer(tree.flatten(model.params))
    heads = [path for path in inside if path[-2] in _HEAD_NORMS]
    norms = [path for path in inside if path[-1] == "scale" and path not in heads]
    return _Block(
        act=_PARTS.get(getattr(c, "hidden_act", "gelu_new"), 3),
        gated=any(
            # By its name in most families and in LFM 2, or fused under any name.
            "gate" in path[-2] or path[-2] == "w3" or leaf.shape[-1] == 2 * c.intermediate_size
            for path, leaf in inside.items()
            if path[-1] == "kernel"
        ),
        norms=len(norms) - 2,
        head_norms=bool(heads),
        softcap=getattr(c, "attn_logit_softcapping", None) is not None,
        experts=getattr(c, "num_experts_per_tok", 0),
    )


def _kept(program: Program, s: Sizes) -> int:
    """Bytes of activations of all layers that the backward pass needs."""
    b = _block(program.model)
    match program.config.train.remat:
        case "none":
            own = s.ranks + _residuals(b, s) + (2 if b.gated else 0) * s.ffn
            own += 2 * b.experts * s.stream
            copies = (
                _experts(program) if b.experts else 0
            )  # each loop over experts keeps its matrix
            return s.layers * (own + copies)
        case "dots":
            # Products of queries, keys, values, output, gate and up with the base, and with the
            # adapters. The product of down is not read again; experts have no dots.
            products = s.queries + 2 * s.keys + s.stream
            products += 0 if b.experts else (1 + b.gated) * s.ffn
            return s.layers * (s.split + (2 if s.ranks else 1) * products + s.ranks)
    return s.layers * s.split  # with `offload` they are in host memory


def _residuals(b: _Block, s: Sizes) -> int:
    """Bytes of a layer's residuals: inputs, norms and residual sums; queries, keys, values;
    probabilities in float32 and in the dtype of products; the parts of the activation function and
    the input of the last projection.
    """
    total = 2 * s.stream + (5 + b.norms) * s.split + (2 + 2 * b.head_norms) * s.queries
    total += (2 + 2 * b.head_norms) * s.keys + (b.act + 1) * s.ffn
    return total + 2 * s.scores + (2 * s.scores + s.scores // 4 if b.softcap else 0)


def _layer(program: Program, s: Sizes) -> int:
    """Bytes in memory at the largest point of a layer's backward pass: in its MLP, with the
    residuals of attention.
    """
    config, b = program.config, _block(program.model)
    # Gradients of the activation's parts, and its residuals unless they are kept already; and the
    # adapters' share of the three projections.
    of_adapters = 1 + 2 * b.gated if s.ranks else 0
    wide = {"none": 4, "full": b.act + 1 + 2 * b.gated + of_adapters}.get(
        config.train.remat, b.act + 3 * b.gated
    )
    total = wide * s.ffn + 2 * s.stream + (3 + b.norms) * s.split + s.ranks
    total += (2 + b.head_norms) * (s.queries + s.keys)
    # Scores and probabilities; on one device also a mask of their shape, which a program for
    # several devices fuses.
    masks = program.mesh.size == 1 and config.train.remat != "none"
    total += (2 + masks + (b.softcap and config.train.remat != "none")) * s.scores
    if b.experts:
        total += 6 * b.experts * s.stream + _experts(program)
    else:
        total += 2 * max(_matrices(program), default=0) // s.tensor * s.number
    if config.adapter.use_dora:  # the product before the gain, for each module
        total += s.ffn + 4 * s.stream
    if config.adapter.dropout and config.train.remat != "none":
        total += (
            2 * s.inputs + s.inputs // s.number * 4
        )  # dropped inputs, their gradients, random bits
    return total


def _experts(program: Program) -> int:
    """Bytes of the matrices of all experts of a layer, sliced from the stack."""
    numbers = sum(
        math.prod(leaf.shape[1:])
        for path, leaf in tree.one_layer(tree.flatten(program.model.params)).items()
        if path[-1] == "kernel" and tree.has_experts(path)
    )
    return numbers // program.mesh.shape["tensor"] * sizes(program).number


def _logits(program: Program, s: Sizes) -> int:
    """Bytes in memory with the logits of a chunk: the logits and their gradient in float32, the
    head in the dtype of its product, and the final hidden states and their gradient, each also in
    chunks.
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
        # A copy of the head, if it is converted to another dtype or sharded anew.
        part = math.prod(leaves[path].shape) // parts
        moved = mesh["fsdp"] > 1 or leaves[path].dtype.itemsize != s.number
        total += part * s.number if moved else 0
    return total


def _size(mesh: Mapping[str, int], axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def _matrices(program: Program) -> Iterable[int]:
    """Yield the number of elements of each matrix of a layer."""
    for path, leaf in tree.one_layer(tree.flatten(program.model.params)).items():
        if path[-1] == "kernel":
            yield math.prod(leaf.shape[tree.lead_axes(path) :])


def layer_weights(program: Program) -> int:
    """Return the number of elements of a layer's matrices on a device, once gathered."""
    total = 0
    for path, leaf in tree.one_layer(tree.flatten(program.model.params)).items():
        if path[-1] == "kernel":
            total += math.prod(leaf.shape[tree.stack_position(path) is not None :])
    return total // program.mesh.shape["tensor"]


def _converted(program: Program) -> int:
    """Bytes of float32 copies of matrices, made before the loops over layers and micro-batches."""
    train = program.config.train
    pieces = train.batch_size // (train.micro_batch_size or train.batch_size)
    return 4 * sum(
        device_numbers(leaf)
        for path, leaf in tree.flatten(program.base).items()
        if isinstance(leaf, jax.ShapeDtypeStruct)
        and leaf.dtype.itemsize == 2
        and (path[-1] == "kernel" and tree.in_layers(path))
        | (path[-1] in ("kernel", "embedding") and pieces > 1)
    )


def full_fine_tuning(config: Config, model: Model, mesh: Any, platform: str = "tpu") -> Estimate:
    """Estimate the same step with every weight trained, in float32."""
    dtype = config.base_dtype if config.base_dtype in ("float32", "bfloat16") else None
    full = dataclasses.replace(config, adapter=AdapterConfig(method="full"), base_dtype=dtype)
    return estimate(build(full, model, mesh), platform)
