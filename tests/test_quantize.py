"""NF4 and int8 leaves: the codes of bitsandbytes, a NumPy reference, sizes, padding, stacks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import quantize as q
from lora_jax.errors import UserError

VALUES = np.float32(q.NF4_VALUES)
MIDDLES = (VALUES[:-1] + VALUES[1:]) / 2
WIDEST_GAP = np.diff(VALUES).max()
quantize = jax.jit(q.quantize, static_argnums=1)
dequantize = jax.jit(q.dequantize, static_argnums=1)


def gaussian(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hard(shape, seed=0) -> np.ndarray:
    """Gaussian columns of very different sizes, a block of zeros, one huge value, and in the last
    column every tie between two codes.
    """
    w = gaussian(shape, seed) * 10.0 ** np.random.default_rng(seed).uniform(-8, 8, shape[-1:])
    w = w.astype(np.float32)
    w[:64, 0] = 0
    w[0, shape[1] // 2] = -1e20
    w[:64, -1] = np.resize(np.concatenate([MIDDLES, VALUES, -MIDDLES]), min(64, shape[0]))
    return w


def packed_by_bitsandbytes(w) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (in/2, out), absmax (in/64, out) and the dequantised array of w (in, out), in the
    weight's own dtype, but for bfloat16 results that NumPy lacks.
    """
    rows, columns = w.shape
    wide = torch.tensor(np.ascontiguousarray(np.asarray(w, np.float32).T))
    kind = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    given = wide.to(kind[str(w.dtype)])
    packed, state = quantize_4bit(given, quant_type="nf4", blocksize=64, compress_statistics=False)
    state.dtype = torch.float32  # what it dequantises to; no rounding then
    plain = dequantize_4bit(packed, state).numpy().T
    absmax = state.absmax.numpy().reshape(columns, rows // 64).T
    return packed.numpy().reshape(columns, rows // 2).T, absmax, plain


def nf4_reference(w) -> np.ndarray:
    """NF4 with double quantisation of one matrix (in, out), a block and a group at a time."""
    w = np.asarray(w, np.float32)
    rows, columns = w.shape
    out = np.empty_like(w)
    for top in range(0, rows, 64):
        block = w[top : top + 64]
        absmax = np.abs(block).max(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(absmax > 0, block * (np.float32(1) / absmax), 0)
        for left in range(0, columns, 256):
            group = slice(left, left + 256)
            largest = absmax[group].max()
            inverse = np.float32(255) / largest if largest > 0 else np.float32(0)
            byte = np.rint(absmax[group] * inverse)
            codes = np.searchsorted(MIDDLES, scaled[:, group], side="left")
            out[top : top + 64, group] = VALUES[codes] * (byte * (largest / np.float32(255)))
    return out


def bits_per_weight(leaf) -> float:
    return 8 * sum(x.nbytes for x in jax.tree.leaves(leaf)) / np.prod(leaf.shape)


def relative_rmse(found, w) -> float:
    return float(np.linalg.norm(found - w) / np.linalg.norm(w))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 2), (128, 7), (576, 192), (1536, 36), (192, 576)], ids=str)
@pytest.mark.parametrize("make", [gaussian, hard])
def test_codes_are_those_of_bitsandbytes(make, shape, dtype):
    for seed in range(3):
        w = make(shape, seed)
        if dtype == np.float16:
            w = np.clip(w, -6e4, 6e4)
        w = w.astype(dtype)
        codes, absmax, plain = packed_by_bitsandbytes(w)
        assert np.array_equal(quantize(w, "nf4").codes, codes)
        found, found_absmax = q._nf4_codes(jnp.asarray(w, jnp.float32))  # op by op
        assert np.array_equal(found, codes) and np.array_equal(found_absmax, absmax)
        back = jax.jit(q._dequantize_nf4, static_argnums=2)(codes, absmax, shape[0])
        assert (np.abs(np.asarray(back) - plain) <= 1e-6 * np.abs(plain)).all()


def test_the_hard_weights_hold_every_code_and_tie():
    codes, _, _ = packed_by_bitsandbytes(hard((128, 7)))
    assert len(np.unique(np.concatenate([codes[:32, -1] >> 4, codes[:32, -1] & 15]))) == 16
    assert np.isin(MIDDLES, hard((128, 7))[:64, -1]).all()
    assert (codes[:32, 0] == 0x77).all()  # zeros


def test_every_code_stands_for_its_value_exactly():
    codes = np.arange(16, dtype=np.uint8)
    assert np.array_equal(q._nf4_value(jnp.asarray(codes)), VALUES)
    assert np.array_equal(jax.jit(q._nf4_value)(codes), VALUES)


@pytest.mark.parametrize("make", [gaussian, hard])
@pytest.mark.parametrize(
    "shape",
    [(64, 256), (128, 255), (64, 257), (192, 600), (36, 72), (72, 36), (100, 3), (65, 300), (1, 1)],
    ids=str,
)
def test_double_quantisation_equals_a_numpy_reference(make, shape):
    for seed in range(3):
        w = make(shape, seed)
        leaf = quantize(w, "nf4")
        assert leaf.shape == shape and leaf.rows == shape[0]
        assert leaf.codes.shape == (-(-shape[0] // 64) * 32, shape[1])
        assert leaf.scales.shape == (-(-shape[0] // 64), shape[1])
        assert leaf.scale_of_scales.shape == (-(-shape[0] // 64), -(-shape[1] // 256))
        found, expected = np.asarray(dequantize(leaf)), nf4_reference(w)
        assert found.shape == w.shape
        assert (np.abs(found - expected) <= 1e-6 * np.abs(expected)).all()


@pytest.mark.parametrize("shape", [(576, 192), (576, 576), (576, 1536), (1536, 576), (4096, 4096)])
def test_nf4_takes_four_bits_and_an_eighth(shape):
    leaf = jax.eval_shape(lambda: quantize(jnp.zeros(shape), "nf4"))
    bits = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf)) * 8 / np.prod(shape)
    assert 4.125 < bits <= 4.13
    assert bits_per_weight(quantize(np.zeros((576, 192)), "nf4")) <= 4.13


def test_error_on_gaussian_weights():
    w = gaussian((576, 1536))
    assert relative_rmse(dequantize(quantize(w, "nf4")), w) == pytest.approx(0.092, abs=5e-4)
    # A step of absmax / 127 over its square root of 12, where absmax is 3.1 sigma.
    assert relative_rmse(dequantize(quantize(w, "int8")), w) == pytest.approx(0.0074, rel=0.05)


@pytest.mark.parametrize("scheme", q.SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=str)
def test_dtypes_and_zeros(scheme, dtype):
    w = jnp.asarray(gaussian((100, 3)), dtype)
    leaf = quantize(w, scheme)
    assert (leaf.dtype, leaf.shape, leaf.ndim) == (jnp.dtype(dtype), (100, 3), 2)
    assert dequantize(leaf).dtype == jnp.float32
    assert dequantize(leaf, jnp.bfloat16).dtype == jnp.bfloat16
    wide = quantize(w.astype(jnp.float32), scheme)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(wide), strict=True)
    )
    zeros = dequantize(quantize(jnp.zeros((2, 100, 3), dtype), scheme))
    assert zeros.shape == (2, 100, 3) and not zeros.any()


def test_one_huge_value_keeps_itself_and_spoils_its_group_alone():
    w = gaussian((128, 520))
    w[5, 300] = 1e12
    found = np.asarray(dequantize(quantize(w, "nf4")))
    assert found[5, 300] == pytest.approx(1e12, rel=1e-6) and np.isfinite(found).all()
    clean = gaussian((128, 520))
    others = np.ones(w.shape, bool)
    others[:64, 256:512] = False
    assert relative_rmse(found[others], clean[others]) < 0.095


@pytest.mark.parametrize("scheme", q.SCHEMES)
def test_stacks_and_slices_give_the_same_bits(scheme):
    w = gaussian((2, 3, 100, 70))
    whole = quantize(w, scheme)
    plain = dequantize(whole)
    assert whole.shape == w.shape and whole.ndim == 4 and plain.shape == w.shape
    for i, k in np.ndindex(2, 3):
        one = quantize(w[i, k], scheme)
        cut = jax.tree.map(lambda x, at=(i, k): x[at], whole)
        assert cut.shape == (100, 70) and cut.dtype == whole.dtype
        assert jax.tree.structure(one) == jax.tree.structure(cut)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(cut), strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(dequantize(one), plain[i, k])
    stack = jax.tree.map(lambda x: x[0], whole)
    _, scanned = jax.jit(lambda s: jax.lax.scan(lambda c, x: (c, dequantize(x)), 0, s))(stack)
    assert np.array_equal(scanned, plain[0])
    assert np.array_equal(jax.vmap(dequantize)(stack), plain[0])


@pytest.mark.parametrize("scheme", q.SCHEMES)
def test_the_bytes_do_not_depend_on_the_compiler(scheme):
    for seed in range(20):  # bfloat16: scales whose ratio is half-way between two bytes
        w = jnp.asarray(gaussian((100, 70), seed), jnp.bfloat16)
        eager, compiled = q.quantize(w, scheme), quantize(w, scheme)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("scheme", q.SCHEMES)
def test_a_scan_holds_one_slice_of_floats_also_under_grad(scheme):
    layers, width = 12, 256
    leaf = quantize(gaussian((layers, width, width)), scheme)
    scale = jnp.ones((layers, width))

    def loss(scale, x, leaf):
        @jax.checkpoint
        def body(x, slices):
            leaf, scale = slices
            return jnp.tanh(x @ dequantize(leaf) * scale), None

        return jax.lax.scan(body, x, (leaf, scale))[0].sum()

    x = jnp.ones((2, width))
    for function in (loss, jax.grad(loss)):
        compiled = jax.jit(function).lower(scale, x, leaf).compile()
        slices = compiled.memory_analysis().temp_size_in_bytes / (4 * width * width)
        assert 1 <= slices < 2.5


def test_int8_equals_a_numpy_reference_within_half_a_step():
    for seed in range(3):
        w = gaussian((100, 70), seed) * 10.0 ** np.linspace(-6, 6, 70, dtype=np.float32)
        w[:, 3] = 0
        w[7, 5] = 1e15
        leaf = quantize(w, "int8")
        absmax = np.abs(w).max(axis=0)
        step = absmax / np.float32(127)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(absmax > 0, np.rint(w * (np.float32(127) / absmax)), 0)
        assert leaf.values.dtype == jnp.int8 and leaf.values.shape == (100, 70)
        assert leaf.scales.dtype == jnp.float32 and leaf.scales.shape == (1, 70)
        assert np.array_equal(leaf.values, values)
        assert np.abs(values).max(axis=0)[absmax > 0].min() == 127
        found = np.asarray(dequantize(leaf), np.float64)
        assert np.allclose(found, values * step, rtol=1e-6, atol=0)
        assert (np.abs(found - w) <= absmax / 127 / 2 * (1 + 1e-5)).all()
        assert 8 <= bits_per_weight(leaf) <= 8 + 32 / 100


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 200), columns=st.sampled_from([5, 300]), seed=st.integers(0, 2**31))
def test_padding_changes_nothing_and_the_error_is_bounded(rows, columns, seed):
    w = gaussian((rows, columns), seed)
    w[:, 0] *= 1e3
    leaf = quantize(w, "nf4")
    padded = quantize(np.pad(w, [(0, -rows % 64), (0, 0)]), "nf4")
    for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(padded), strict=True):
        assert np.array_equal(a, b)
    found = np.asarray(dequantize(leaf))
    assert found.shape == w.shape
    assert np.array_equal(found, np.asarray(dequantize(padded))[:rows])
    for top in range(0, rows, 64):
        for left in range(0, columns, 256):
            at = np.s_[top : top + 64, left : left + 256]
            absmax = np.abs(w[at]).max(axis=0)
            bound = absmax * WIDEST_GAP / 2 + absmax.max() / 510
            assert (np.abs(found - w)[at] <= bound * (1 + 1e-5)).all()


def test_leaves_of_a_tree_keep_their_static_parts_apart():
    w = gaussian((100, 8))
    a, b = quantize(w, "nf4"), quantize(w.astype(np.float16), "nf4")
    assert jax.tree.structure(a) == jax.tree.structure(quantize(2 * w, "nf4"))
    assert jax.tree.structure(a) != jax.tree.structure(b)  # a merge would round otherwise
    assert jax.tree.structure(a) != jax.tree.structure(quantize(w[:99], "nf4"))
    assert [x.dtype for x in jax.tree.leaves(a)] == [jnp.uint8, jnp.uint8, jnp.float32]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(
        UserError, match="'fp4' is not a quantisation scheme; .*: int8, nf4. Did you"
    ):
        quantize(np.zeros((64, 2)), "fp4")
