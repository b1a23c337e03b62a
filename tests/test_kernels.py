"""Fused attention against `layers.attention`: outputs and gradients, whatever a family asks for."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.nn import kernels
from lora_jax.nn.attention import attention, mask_specs
from lora_jax.nn.texts import Texts

from .families import describe

# b, t, query heads, kv heads, head size; no block of 128 tokens is full in the first.
SIZES = {"grouped": (2, 70, 6, 2, 8), "blocks": (1, 256, 3, 1, 16), "even": (2, 130, 4, 4, 64)}
ROWS = {
    "causal": ("grouped", {}),
    "window": ("grouped", {"windows": (5,)}),
    "window beyond a block, bent scores": ("blocks", {"softcap": 1.5, "windows": (130,)}),
    "second of two kinds, bent scores": (
        "grouped",
        {"softcap": 1.5, "windows": (None, 7), "which": 1},
    ),
    "first of two kinds": ("grouped", {"windows": (None, 7), "which": 0}),
    "encoder": ("even", {"causal": False}),
    "encoder, window": ("even", {"causal": False, "windows": (9,)}),
    "sinks": ("grouped", {"sinks": True}),
    "sinks, second of two kinds": ("blocks", {"sinks": True, "windows": (None, 130), "which": 1}),
}


def draw(size, seed, dtype):
    """Queries, keys, values, a slope for the output, and packed segments with padding behind."""
    b, t, n, k, h = size
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, k, t, h), (b, k, t, h), (b, t, n, h))
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    ends = np.sort(rng.integers(1, t, (b, 3)), axis=1)  # three texts, and padding
    segments = (np.arange(t)[None, :, None] >= ends[:, None, :]).sum(-1) + 1
    segments[segments == 4] = 0
    return arrays, jnp.asarray(segments, jnp.int32)


def both(kernel, size, seed, *, windows=(None,), which=0, causal=True, dtype=jnp.float32, **more):
    """(output, gradients) of a fused kernel, and of `layers.attention`. `more`: softcap, sinks."""
    (*inputs, slope), segments = draw(SIZES[size], seed, dtype)
    softcap = more.get("softcap")
    if "sinks" in more:
        heads = SIZES[size][2]
        inputs.append(jnp.asarray(np.random.default_rng(seed).standard_normal(heads) + 1, dtype))
    texts = Texts(segments, segments)
    masks = (texts.visible(causal=False, window=windows[0]),)
    if causal:
        masks = mask_specs("xla", texts, None, windows)[which]
    spec = kernels.MaskSpec(texts, jnp.int32(which), kernel, windows, causal)

    @jax.jit
    def measure(seen, *inputs):
        def run(queries, keys, values, sinks=None):
            return attention(queries, [(keys, values)], seen, 0.3, softcap, sinks)

        y, pull = jax.vjp(run, *inputs)
        return y, pull(slope)

    return measure(spec, *inputs), measure(masks, *inputs)


def check(pair, tolerance=1e-5):
    for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        distance = float(jnp.max(jnp.abs(x - y)) / jnp.maximum(1, jnp.max(jnp.abs(y))))
        assert distance <= tolerance and float(jnp.max(jnp.abs(y))) > 0.1


@pytest.mark.parametrize("row", ROWS)
def test_splash_is_attention(row):
    size, fields = ROWS[row]
    check(both("splash", size, len(row), **fields))


# What cuDNN computes: it bends no scores and has no sinks.
CUDNN = {name: row for name, row in ROWS.items() if not {"softcap", "sinks"} & row[1].keys()}


@pytest.mark.parametrize("row", CUDNN)
def test_the_masks_that_cudnn_gets(monkeypatch, row):
    """The same call with JAX's own implementation, which runs here."""
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(kernels, "_dot_product", plain)
    size, fields = CUDNN[row]
    check(both("cudnn", size, len(row), **fields))


@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="cuDNN runs on NVIDIA GPUs")
@pytest.mark.parametrize("row", CUDNN)
def test_cudnn_is_attention(row):
    """In bfloat16, which has 8 bits: both round products of up to 130 terms."""
    size, fields = CUDNN[row]
    check(both("cudnn", size, len(row), **fields, dtype=jnp.bfloat16), tolerance=0.03)


def device(platform, kind="a device", capability=None):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


TPU, CPU = device("tpu", "TPU v5p"), device("cpu", "cpu")
H100, A100 = device("gpu", "NVIDIA H100", "9.0"), device("gpu", "NVIDIA A100", "8.0")
V100, MI300 = device("gpu", "NVIDIA V100", "7.0"), device("gpu", "AMD MI300", "gfx942")


def model(head_dim=64, softcap=None):
    return types.SimpleNamespace(head_dim=head_dim, attn_logit_softcapping=softcap)


SINKS = describe("gpt_oss", head_dim=64).config


@pytest.mark.parametrize(
    ("where", "config", "dtype", "expected"),
    [
        (TPU, model(), "float32", "splash"),
        (TPU, model(256, 50.0), "bfloat16", "splash"),
        (CPU, model(), "bfloat16", "xla"),
        (H100, model(), "bfloat16", "cudnn"),
        (H100, model(256), "bfloat16", "cudnn"),
        (A100, model(128), "bfloat16", "cudnn"),
        (A100, model(256), "bfloat16", "xla"),
        (H100, model(), "float32", "xla"),
        (H100, model(36), "bfloat16", "xla"),
        (H100, model(64, 50.0), "bfloat16", "xla"),
        (H100, SINKS, "bfloat16", "xla"),
        (TPU, SINKS, "bfloat16", "splash"),
        (V100, model(), "bfloat16", "xla"),
        (MI300, model(), "bfloat16", "xla"),
    ],
)
def test_what_auto_takes(where, config, dtype, expected):
    assert kernels.choose("auto", config, dtype, where) == expected
    assert kernels.choose(expected, config, dtype, where) == expected
    assert kernels.choose("xla", config, dtype, where) == "xla"


@pytest.mark.parametrize(
    ("name", "where", "config", "dtype", "expected"),
    [
        (
            "splash",
            H100,
            model(),
            "bfloat16",
            "NVIDIA H100: it runs on TPUs; auto would take cudnn",
        ),
        (
            "cudnn",
            TPU,
            model(),
            "bfloat16",
            "it runs on NVIDIA GPUs from compute capability 8.0 on",
        ),
        ("cudnn", MI300, model(), "bfloat16", "it runs on NVIDIA GPUs"),
        ("cudnn", H100, model(), "float32", "train.compute_dtype is float32; auto would take xla"),
        ("cudnn", A100, model(256), "bfloat16", "a multiple of 8 features up to 128, not 256"),
        ("cudnn", H100, model(64, 50.0), "bfloat16", "it has no softcap on scores"),
        ("cudnn", H100, SINKS, "bfloat16", "it has no sinks in the softmax of heads"),
    ],
)
def test_a_kernel_that_cannot_work_is_refused(name, where, config, dtype, expected):
    with pytest.raises(UserError, match=f"train.attention={name} cannot be used on") as raised:
        kernels.choose(name, config, dtype, where)
    assert expected in str(raised.value)
