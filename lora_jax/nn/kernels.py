"""Fused attention kernels, which do not store the scores of all pairs of tokens, and their choice.

    xla      `attention.attention`: every platform and model, float32 and bfloat16, with a cache too
    cudnn    NVIDIA GPUs from compute capability 8.0 on, bfloat16, head size a multiple of 8 up to
             128 (256 from 9.0 on), no softcap on scores and no sinks;
             `jax.nn.dot_product_attention`
    splash   TPUs; JAX's Pallas kernel of that name. Elsewhere it is interpreted, for tests

A fused kernel computes attention among the tokens of a batch, as training and held-out losses need
it. Attention over a cache or a prefix uses xla. Rows are padded to whole blocks of 128 tokens with
tokens of a segment of their own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.nn.texts import Texts

NAMES = ("xla", "cudnn", "splash")
_BLOCK = 128  # tokens; the lanes of a TPU
_dot_product = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Description of a mask (b, t, t) for a fused kernel.

    A query sees what `Texts.visible` says, with the window `windows[which]`.
    """

    texts: Texts
    which: jax.Array  # () index of the window; traced, as one scan runs layers of several kinds
    kernel: str = field(metadata={"static": True})  # cudnn | splash
    windows: tuple[int | None, ...] = field(default=(None,), metadata={"static": True})
    causal: bool = field(default=True, metadata={"static": True})


class _Operands(NamedTuple):
    """Arrays of attention that are divided by rows or heads."""

    queries: jax.Array  # (b, t, n, h)
    keys: jax.Array  # (b, k, t, h)
    values: jax.Array  # (b, k, t, h)
    sinks: jax.Array | None  # (n,)


@dataclass(frozen=True)
class _Scores:
    """Settings of the scores of queries and keys."""

    scale: float
    softcap: float | None
    causal: bool


def choose(name: str, config: Any, dtype: Any, device: Any) -> str:
    """Return the kernel of `train.attention` for a model's `config`, a compute dtype and the
    devices of a mesh. auto: splash on TPUs, cudnn where it can compute the model, else xla.

    Raises:
        UserError: the kernel named cannot compute the model on this device.
    """
    problems = {
        "xla": None,
        "cudnn": _cudnn_problem(config, jnp.dtype(dtype), device),
        "splash": None if device.platform == "tpu" else "it runs on TPUs",
    }
    if name == "auto":
        return next(kernel for kernel in ("splash", "cudnn", "xla") if problems[kernel] is None)
    if problems[name] is not None:
        raise UserError(
            f"train.attention={name} cannot be used on {device.device_kind}: {problems[name]}; "
            f"auto would take {choose('auto', config, dtype, device)}"
        )
    return name


def _cudnn_problem(config: Any, dtype: np.dtype, device: Any) -> str | None:
    capability = getattr(device, "compute_capability", None)  # "9.0"; AMD's is a name
    try:
        version = float(str(capability))
    except ValueError:
        version = 0.0
    largest = 256 if version >= 9 else 128
    if device.platform != "gpu" or version < 8:
        return "it runs on NVIDIA GPUs from compute capability 8.0 on"
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, and train.compute_dtype is {dtype}"
    each = getattr(config, "kv_shapes", ((None, config.head_dim),))
    if wrong := [size for _, size in each if size % 8 or size > largest]:
        return f"it needs heads of a multiple of 8 features up to {largest}, not {wrong[0]}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no softcap on scores (attn_logit_softcapping), which the model needs"
    if getattr(config, "attention_sinks", False):
        return "it has no sinks in the softmax of heads, which the model needs"
    return None


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    spec: MaskSpec,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention by a fused kernel: queries (b, t, n, h), keys and values (b, k, t,
    h), and the sinks (n,) of heads that have one -> (b, t, n, h). Each device of the mesh computes
    its own rows and heads.

    If the tensor axis does not divide the kv heads, they are repeated, so that each device has the
    heads that its queries need. If it does not divide the query heads, all devices along the axis
    compute all heads.
    """
    compute = functools.partial(_local, spec, _Scores(scale, softcap, spec.causal))
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = None, None
    if not mesh.empty:
        splits, kv_heads = mesh.shape["tensor"], keys.shape[1]
        if queries.shape[2] % splits == 0:
            heads = "tensor"
            times = int(np.lcm(kv_heads, splits)) // kv_heads
            keys, values = (jnp.repeat(x, times, axis=1) for x in (keys, values))
        if len(queries) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            rows = ("data", "fsdp")
        wide, narrow = P(rows, None, heads, None), P(rows, heads, None, None)
        own: Any = (wide, narrow, narrow, None if sinks is None else P(heads))
        compute = jax.shard_map(
            compute,
            in_specs=(_Operands(*own), P(rows, None), P()),
            out_specs=wide,
            check_vma=False,  # Pallas calls do not say along which axes their outputs vary
        )
    return compute(_Operands(queries, keys, values, sinks), spec.texts, spec.which)


def _local(
    spec: MaskSpec,
    scores: _Scores,
    operands: _Operands,
    texts: Texts,
    which: jax.Array,
) -> jax.Array:
    """`attend` on one device."""
    queries, keys, values, sinks = operands
    time = queries.shape[1]
    padding = -time % _BLOCK
    queries = jnp.pad(queries, ((0, 0), (0, padding), (0, 0), (0, 0)))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (keys, values))
    texts = _pad(texts, padding)
    kernel = {"splash": _splash, "cudnn": _cudnn}[spec.kernel]
    branches: list[Callable] = [
        functools.partial(kernel, window=window, scores=scores) for window in spec.windows
    ]
    arguments = (_Operands(queries, keys, values, sinks), texts)
    one = len(branches) == 1
    mixed = branches[0](*arguments) if one else jax.lax.switch(which, branches, *arguments)
    return mixed[:, :time]


def _pad(texts: Texts, padding: int) -> Texts:
    """Return texts with `padding` more tokens in each row, in a text of their own."""

    def pad(x: jax.Array, value: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padding)), constant_values=value)

    until = texts.seen_until
    if until is not None:
        until = pad(until, until.shape[1] + padding)
    return Texts(pad(texts.positions, 0), pad(texts.segment_ids, -1), until)


def _splash(operands: _Operands, texts: Texts, *, window: int | None, scores: _Scores):
    """Attention by the Pallas kernel. Its mask is a function of two positions; where texts share
    their start it is an array, a byte for every pair of tokens.
    """
    queries, keys, values, sinks = operands
    heads, time = queries.shape[2], queries.shape[1]
    block = next(size for size in (512, 256, _BLOCK) if time % size == 0)
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{side}": block for side in sides}

    def make(interpret: bool, mask: Any) -> Callable:
        return splash.make_splash_mha(
            mask,
            block_sizes=splash.BlockSizes(**blocks),
            attn_logits_soft_cap=scores.softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

    def run(interpret: bool, texts: Texts, sinks: jax.Array | None, *arrays: jax.Array) -> Any:
        if texts.seen_until is None:
            kernel = make(interpret, splash.MultiHeadMask([_mask(time, window, scores)] * heads))
            ids = splash.SegmentIds(texts.segment_ids, texts.segment_ids)
            return jax.vmap(functools.partial(kernel, sinks=sinks))(*arrays, ids)

        def attend(mask: jax.Array, *own: jax.Array) -> jax.Array:
            kernel = make(interpret, mask)
            # JAX makes an array of this flag, which it then wants to read.
            kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
            return kernel(*own, sinks=sinks)

        masks = texts.visible(scores.causal, window)[:, None]  # the same for all heads
        return jax.vmap(attend)(masks, *arrays)

    scaled = (queries * scores.scale).astype(queries.dtype).swapaxes(1, 2)
    mixed = jax.lax.platform_dependent(
        *(texts, sinks, scaled, keys, values),
        tpu=functools.partial(run, False),
        default=functools.partial(run, True),
    )
    return mixed.swapaxes(1, 2)


def _mask(time: int, window: int | None, scores: _Scores) -> Any:
    """Return the mask of splash for texts that share nothing."""
    if window is not None:
        return splash.LocalMask((time, time), (window - 1, 0 if scores.causal else window - 1), 0)
    return (splash.CausalMask if scores.causal else splash.FullMask)((time, time))


def _cudnn(operands: _Operands, texts: Texts, *, window: int | None, scores: _Scores):
    """Attention by cuDNN. Texts and window become a mask (b, 1, t, t) of one layer at a time;
    `is_causal` lets the kernel skip blocks above the diagonal.
    """
    queries, keys, values, sinks = operands
    assert scores.softcap is None and sinks is None  # `choose` refuses them
    mask = texts.visible(causal=False, window=window)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    settings = {"mask": mask[:, None], "scale": scores.scale, "is_causal": scores.causal}
    return _dot_product(queries, keys, values, **settings)
