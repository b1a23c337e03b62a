"""Weighted sums to the last digit, the tail of the spectrum, TIES and DARE number by number."""

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lora_jax import AdapterConfig, UserError, lora
from lora_jax.adapters import svd
from lora_jax.adapters.combine import Part, combine, drop, elect, plan, trim
from lora_jax.targets import HEAD, find_trainable
from lora_jax.tree import flatten
from lora_jax.weights import LoraWeight, Untied

from ..families import FAMILIES, random_model
from ..formats.test_peft import random_adapters

EXACT = 1e-6
QV = ["q_proj", "v_proj"]
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
BIASED = UNTIED | dict(attention_bias=True, mlp_bias=True)
AS_ONE, APART = dict(ensure_weight_tying=True), dict(ensure_weight_tying=False)
PATTERNS = dict(
    target_modules=["q_proj", "k_proj", "up_proj"],
    rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "up_proj": 1},
    alpha_pattern={"k_proj": 2.5, "up_proj": 9.0},
)

# name -> (family, fields of the base, fields of every adapter)
TABLE = {
    "ranks, alphas, patterns, layers, targets": (
        "llama",
        UNTIED,
        [{}, PATTERNS | dict(rank=3, use_rslora=True), dict(target_modules=QV, rank=2)],
    ),
    "layers of their own": (
        "llama",
        UNTIED,
        [dict(layers_to_transform=[0], rank=3), dict(layers_to_transform=[2], use_rslora=True)],
    ),
    "above a side": ("llama", UNTIED, [dict(rank=12), dict(rank=11, use_rslora=True)]),
    "pissa and olora": (
        "llama",
        UNTIED,
        [dict(init="pissa", target_modules=QV), dict(init="olora", use_rslora=True, rank=2)],
    ),
    "embedding and head": (
        "llama",
        UNTIED,
        [dict(target_modules=["embed_tokens", "q_proj"]), dict(target_modules=["lm_head"], rank=2)],
    ),
    "tied as one": (
        "llama",
        TIED,
        [
            dict(target_modules=["embed_tokens", "q_proj"], rank=3, **AS_ONE),
            dict(target_modules=["lm_head"], **AS_ONE),
            dict(target_modules=QV),
        ],
    ),
    "tied as one, and apart": (
        "llama",
        TIED,
        [
            dict(target_modules=["embed_tokens", "q_proj"], rank=3, **AS_ONE),
            dict(target_modules=["embed_tokens"], **APART),
            dict(target_modules=["lm_head", "q_proj"], rank=2, **APART),
        ],
    ),
    "tied and saved": (
        "llama",
        TIED,
        [
            dict(target_modules=QV, modules_to_save=["lm_head"], **AS_ONE),
            dict(target_modules=["lm_head", "q_proj"], **APART),
            dict(target_modules=QV, modules_to_save=["embed_tokens"], **APART),
        ],
    ),
    "biases of all, of adapted, of none": (
        "llama",
        BIASED,
        [
            dict(bias="all", target_modules=QV),
            dict(bias="lora_only", target_modules=["q_proj"]),
            dict(rank=2, target_modules=["q_proj", "down_proj"]),
        ],
    ),
    "biases of adapted": (
        "llama",
        BIASED,
        [dict(bias="lora_only", target_modules=["q_proj"]), dict(target_modules=["up_proj"])],
    ),
    "saved in one and adapted in another": (
        "llama",
        BIASED,
        [
            dict(target_modules=QV, modules_to_save=["layers.1.mlp", "norm"]),
            dict(bias="lora_only"),
            dict(target_modules=QV, modules_to_save=["layers.1.mlp.up_proj", "lm_head"]),
        ],
    ),
    "tokens": (
        "llama",
        TIED,
        [
            dict(target_modules=QV, trainable_token_indices=[5, 3, 90]),
            dict(target_modules=QV, trainable_token_indices=[90, 7]),
            dict(rank=2),
        ],
    ),
    "parts of a fused projection": (
        "phi3",
        {},
        [
            dict(target_modules=["qkv_proj.k", "qkv_proj.q", "gate_up_proj.up"], rank=3),
            dict(target_modules=["qkv_proj", "down_proj"], use_rslora=True),
            dict(target_modules=["qkv_proj.v"], rank_pattern={"v": 2}),
        ],
    ),
    "experts and routers": (
        "mixtral",
        {},
        [
            dict(rank=3),
            dict(target_modules=["gate", "down_proj", "gate_up_proj.up"], use_rslora=True, rank=2),
        ],
    ),
    "experts whole": (
        "mixtral",
        {},
        [
            dict(target_modules=["q_proj"], modules_to_save=["layers.1.mlp.experts"]),
            dict(target_modules=["experts.gate_up_proj"], rank=2),
        ],
    ),
}


def tiny(family, seed=0, **fields):
    return random_model(family, seed, **FAMILIES[family].size | fields)


def changes(params, adapters, config):
    """What an adapter adds to every weight, in float64, by way of `bind`; of a tied embedding that
    parts, both.
    """
    bound = flatten(lora.bind(lora.residual(params, adapters, config), adapters, config))
    found = {}
    for path, base in flatten(params).items():
        leaf = bound[path]
        found[path] = dense(leaf.embed if isinstance(leaf, Untied) else leaf) - double(base)
        if path[-1] == "embedding":
            head = leaf.head if isinstance(leaf, Untied) else leaf
            found[HEAD if HEAD not in bound else path] = dense(head) - double(base)
    return found


def double(x):
    return np.asarray(x, np.float64)


def dense(leaf):
    if not isinstance(leaf, LoraWeight):
        return double(leaf)
    moved = dense(leaf.base) + double(leaf.a) @ double(leaf.b)
    return moved if leaf.gain is None else moved * double(leaf.gain)


def make_parts(model, fields, seed, weights=(0.7, -1.3, 0.4)):
    configs = [AdapterConfig(**dict(rank=4, alpha=6.0) | own) for own in fields]
    return [
        Part(random_adapters(model.params, config, 10 * seed + i), config, weight, f"adapter {i}")
        for i, (config, weight) in enumerate(zip(configs, weights, strict=False))
    ]


def distance(found, expected):
    """The largest relative distance of any leaf; what shall not change must not."""
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        if not np.any(change):
            assert not np.any(found[path]), path
    return max(
        np.linalg.norm(found[path] - change) / np.linalg.norm(change)
        for path, change in expected.items()
        if np.any(change)
    )


def true_sum(model, parts):
    each = [changes(model.params, part.adapters, part.config) for part in parts]
    weights = [part.weight for part in parts]
    return {
        path: sum(w * own[path] for w, own in zip(weights, each, strict=True)) for path in each[0]
    }


@pytest.mark.parametrize(("family", "base", "fields"), TABLE.values(), ids=TABLE)
def test_a_sum_is_the_sum_of_the_updates(family, base, fields):
    for seed in (0, 1):
        model = tiny(family, seed, **base)
        parts = make_parts(model, fields, seed)
        made = combine(model.params, parts)
        expected = true_sum(model, parts)
        assert distance(changes(model.params, made.adapters, made.config), expected) < EXACT
        assert made.error < EXACT


def test_ranks_of_a_sum_add_up_by_module():
    model = tiny("llama")
    parts = make_parts(model, TABLE["ranks, alphas, patterns, layers, targets"][2], 0)
    found = find_trainable(model.params, combine(model.params, parts).config)
    ranks = {n: r for t in found.targets for n, r in zip(t.names, t.ranks, strict=True)}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert ranks[f"{attention}.q_proj"] == 4 + 7 + 2
    assert ranks["model.layers.0.self_attn.q_proj"] == 4 + 3 + 2
    assert (ranks[f"{attention}.o_proj"], ranks[f"{mlp}.up_proj"]) == (4, 4 + 1)
    full = find_trainable(
        model.params, combine(model.params, make_parts(model, TABLE["above a side"][2], 0)).config
    )
    assert {t.path[-1]: t.rank for t in full.targets}["k_proj"] == 16  # of 36 x 16


def spectra(change):
    """Singular values of every matrix of a leaf."""
    return np.linalg.svd(change, compute_uv=False)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_error_of_svd_is_the_tail_of_the_spectrum(family):
    for seed in (0, 1):
        model = tiny(family, seed)
        parts = make_parts(model, [dict(rank=4), dict(rank=3, use_rslora=True)], seed)
        made = combine(model.params, parts, "svd", rank=5)
        expected = true_sum(model, parts)
        found = changes(model.params, made.adapters, made.config)
        tails, sizes = 0.0, 0.0
        for path, change in expected.items():
            if not np.any(change):
                continue
            values = spectra(change)
            tail = np.square(values[..., 5:]).sum()
            assert np.sqrt(np.square(found[path] - change).sum() / tail) == pytest.approx(1, 1e-5)
            tails, sizes = tails + tail, sizes + np.square(values).sum()
            tail, size = (
                np.square(v).reshape(len(v), -1).sum(1) for v in (values[..., 5:], values)
            )
            names = [n for n in made.errors if n.endswith("." + ".".join(path[2:-1]))]
            errors = [made.errors[name] for name in names]
            assert errors == pytest.approx(np.sqrt(tail / size).tolist(), 1e-6)
        assert made.error == pytest.approx(np.sqrt(tails / sizes), 1e-6)
        assert made.error > 0.05


def test_a_full_rank_loses_nothing_and_one_adapter_can_shrink():
    model = tiny("llama")
    parts = make_parts(model, [dict(rank=6)], 0, weights=(1.0,))
    whole = combine(model.params, parts, "svd", rank=6)
    assert whole.error < 1e-12
    assert (
        distance(changes(model.params, whole.adapters, whole.config), true_sum(model, parts))
        < EXACT
    )
    small = combine(model.params, parts, "svd", rank=2)
    assert small.config.rank == 2 and small.error > 0.1


def test_dora_is_summed_by_its_dense_update():
    for seed in (0, 1):
        model = tiny("phi3", seed)
        fields = [
            dict(use_dora=True, target_modules=["qkv_proj.q", "o_proj", "qkv_proj.k"]),
            dict(rank=2, target_modules=["qkv_proj"]),
        ]
        parts = make_parts(model, fields, seed)
        expected = true_sum(model, parts)
        made = combine(model.params, parts, "svd", rank=36)
        assert distance(changes(model.params, made.adapters, made.config), expected) < 1e-5
        made = combine(model.params, parts, "svd", rank=8)
        tails = [np.square(spectra(x)[..., 8:]).sum() for x in expected.values() if np.any(x)]
        sizes = [np.square(x).sum() for x in expected.values()]
        assert made.error == pytest.approx(np.sqrt(sum(tails) / sum(sizes)), 1e-5)


def ties_by_numbers(updates, weights, density):
    """TIES as its paper says it, one number at a time."""
    trimmed = []
    for update, weight in zip(updates, weights, strict=True):
        order = sorted(range(update.size), key=lambda i: -abs(update.flat[i]))
        kept = np.zeros(update.size)
        for i in order[: int(density * update.size)]:
            kept[i] = weight * update.flat[i]
        trimmed.append(kept)
    out = np.zeros(updates[0].size)
    for i in range(out.size):
        numbers = [kept[i] for kept in trimmed]
        sign = 1 if sum(numbers) >= 0 else -1
        same = [x for x in numbers if x * sign > 0]
        out[i] = sum(same) / len(same) if same else 0
    return out.reshape(updates[0].shape)


def dense_parts(model, fields, seed, weights):
    parts = make_parts(model, fields, seed, weights)
    return parts, [changes(model.params, part.adapters, part.config) for part in parts]


FIELDS = [dict(rank=4), dict(rank=3, use_rslora=True, target_modules=QV), dict(rank=2)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -1.3, 0.4)])
def test_ties_is_the_one_of_numpy(weights):
    for seed in (0, 1):
        model = tiny("llama", seed, num_hidden_layers=2)
        parts, each = dense_parts(model, FIELDS, seed, weights)
        made = combine(model.params, parts, "ties", density=0.3, rank=36)
        found = changes(model.params, made.adapters, made.config)
        for path, change in found.items():
            for layer in range(2) if np.any(change) else ():
                own = [
                    (x[path][layer], w)
                    for x, w in zip(each, weights, strict=True)
                    if np.any(x[path])
                ]
                expected = ties_by_numbers(*zip(*own, strict=True), 0.3)
                error = np.linalg.norm(change[layer] - expected) / np.linalg.norm(expected)
                assert error < 1e-5, path
        assert made.error < 1e-6


def test_ties_of_alike_weights_is_that_of_peft():
    rng = np.random.default_rng(0)
    for density in (0.2, 0.5, 0.9):
        updates = [rng.standard_normal((7, 13)) for _ in range(3)]
        ours = elect([0.6 * trim(x, density) for x in updates])
        theirs = merge_utils.ties(
            [torch.tensor(x) for x in updates], torch.full((3,), 0.6, dtype=torch.float64), density
        )
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_one_of_numpy(method):
    weights, density = (0.7, -1.3, 0.4), 0.4
    model = tiny("llama", num_hidden_layers=2)
    parts, each = dense_parts(model, FIELDS, 0, weights)
    made = combine(model.params, parts, method, density=density, rank=36, seed=3)
    again = combine(model.params, parts, method, density=density, rank=36, seed=3)
    other = combine(model.params, parts, method, density=density, rank=36, seed=4)
    found = changes(model.params, made.adapters, made.config)
    assert distance(changes(model.params, again.adapters, again.config), found) == 0
    assert distance(changes(model.params, other.adapters, other.config), found) > 0.1
    # Numbers of the result are among what any choice of dropped ones gives: 8 of three adapters.
    path = ("model", "layers", "self_attn", "q_proj", "kernel")
    scaled = [w * x[path] / density for w, x in zip(weights, each, strict=True)]
    choices = []
    for kept in np.ndindex(2, 2, 2):
        numbers = np.stack([k * x for k, x in zip(kept, scaled, strict=True)])
        if method == "dare_ties":
            sign = np.where(numbers.sum(0) >= 0, 1, -1)
            count = (numbers * sign > 0).sum(0)
            numbers = np.where(numbers * sign > 0, numbers, 0) / np.maximum(count, 1)
        choices.append(numbers.sum(0))
    gaps = np.abs(np.stack(choices) - found[path])
    assert gaps.min(0).max() < 1e-5 * np.abs(found[path]).max()
    share = np.bincount(gaps.argmin(0).ravel(), minlength=8) / gaps[0].size
    if method == "dare_linear":  # every adapter keeps `density` of its numbers, on its own
        for i, kept in enumerate(np.ndindex(2, 2, 2)):
            expected = np.prod([density if k else 1 - density for k in kept])
            assert share[i] == pytest.approx(expected, abs=0.03)


def test_drop_keeps_the_mean():
    x = np.random.default_rng(0).standard_normal((20, 30))
    mean = np.mean([drop(x, 0.3, np.random.default_rng(seed)) for seed in range(400)], axis=0)
    assert np.linalg.norm(mean - x) / np.linalg.norm(x) < 0.1
    kept = drop(x, 0.3, np.random.default_rng(0))
    np.testing.assert_allclose(kept[kept != 0], x[kept != 0] / 0.3)


def test_trim_keeps_the_largest():
    x = np.asarray([[3.0, -5.0, 1.0], [0.5, -2.0, 4.0]])
    np.testing.assert_array_equal(trim(x, 0.5), [[3, -5, 0], [0, 0, 4]])
    np.testing.assert_array_equal(trim(x, 1.0), x)
    assert np.count_nonzero(trim(x, 0.01)) == 1


def test_what_trains_whole_takes_part_in_ties_and_dare():
    """Biases, modules and rows of tokens, without any loss of rank."""
    model = tiny("llama", **BIASED)
    fields = [
        dict(bias="all", modules_to_save=["norm"], trainable_token_indices=[1, 2]),
        dict(bias="all", modules_to_save=["norm"], trainable_token_indices=[2, 9], rank=2),
    ]
    weights = (0.9, -0.5)
    parts, each = dense_parts(model, fields, 0, weights)
    made = combine(model.params, parts, "ties", density=0.5)
    found = changes(model.params, made.adapters, made.config)
    for path, rows in (
        (("model", "norm", "scale"), slice(None)),
        (("model", "embed_tokens", "embedding"), [1, 2, 9]),
        (("model", "layers", "mlp", "up_proj", "bias"), 1),
    ):
        expected = ties_by_numbers([x[path][rows] for x in each], weights, 0.5)
        np.testing.assert_allclose(found[path][rows], expected, atol=1e-6)
        assert np.any(expected)
    thinned = combine(model.params, parts, "dare_linear", density=1.0, rank=6)
    found = changes(model.params, thinned.adapters, thinned.config)
    assert distance(found, true_sum(model, parts)) < EXACT


def test_the_base_is_asked_for_only_where_it_is_needed():
    def no_base(path, index):
        raise AssertionError(path)

    model = tiny("llama", **BIASED)
    parts = make_parts(model, [{}, dict(rank=2)], 0)
    for method, options in (("sum", {}), ("svd", dict(rank=3)), ("ties", dict(density=0.5))):
        combine(model.params, parts, method, read=no_base, **options)
    fields = dict(target_modules=QV, modules_to_save=["norm"])
    halves = make_parts(model, [fields, fields], 0, weights=(0.25, 0.75))
    combine(model.params, halves, read=no_base)
    with pytest.raises(AssertionError, match="norm"):
        combine(model.params, make_parts(model, [fields], 0), read=no_base)


LLAMA = (dict(rank=4), dict(rank=3))
MISTAKES = [
    (LLAMA, "svdd", {}, "method='svdd' is not one of: sum, svd, ties.*Did you mean 'svd'?"),
    ((), "sum", {}, "there is no adapter"),
    (LLAMA, "sum", dict(rank=4), "method=sum is exact.*for rank=4 use method=svd"),
    (LLAMA, "svd", {}, "method=svd needs a rank"),
    (LLAMA, "svd", dict(rank=0), "rank=0 must be at least 1"),
    (LLAMA, "svd", dict(rank=8), r"rank=8 is larger than any module.*the most is 7 \(model"),
    (LLAMA, "ties", dict(rank=37, density=0.5), "rank=37 is larger than any.*the most is 36"),
    (LLAMA, "ties", {}, "method=ties needs a density"),
    (LLAMA, "svd", dict(rank=2, density=0.5), "density=0.5 is for ties, dare_linear, dare_ties"),
    (LLAMA, "dare_ties", dict(density=0.0), "density=0.0 must be above 0"),
    (LLAMA, "dare_ties", dict(density=1.5), "density=1.5 must be above 0 and at most 1"),
    (
        (dict(use_dora=True), {}),
        "sum",
        {},
        "adapter 0 is a DoRA adapter.*use method=svd and a rank",
    ),
    (
        (dict(trainable_token_indices=[1]), dict(target_modules=["embed_tokens"])),
        "sum",
        {},
        r"adapter 0 trains tokens .* and adapter 1 the embedding model.embed_tokens",
    ),
    ((dict(method="full"),), "sum", {}, "adapter 0: method=full"),
]


@pytest.mark.parametrize(("fields", "method", "options", "text"), MISTAKES)
def test_mistakes_are_refused_by_name(fields, method, options, text):
    model = tiny("llama", num_hidden_layers=2, **UNTIED)
    parts = make_parts(model, [f for f in fields if f.get("method") != "full"], 0)
    if any(f.get("method") == "full" for f in fields):
        parts = [Part({}, AdapterConfig(method="full"), name="adapter 0")]
    with pytest.raises(UserError, match=text):
        plan(model.params, parts, method, **options)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_are_numbers_other_than_zero(weight):
    model = tiny("llama", num_hidden_layers=2)
    parts = make_parts(model, [{}], 0, weights=(weight,))
    with pytest.raises(UserError, match="adapter 0: weight=.* must be a number other than zero"):
        plan(model.params, parts)


def test_adapters_must_fit_their_config():
    model = tiny("llama", num_hidden_layers=2)
    (part,) = make_parts(model, [{}], 0)
    wrong = Part(part.adapters, AdapterConfig(rank=3), name="adapter 0")
    with pytest.raises(UserError, match="adapter 0 does not fit model and config.*expected"):
        plan(model.params, [wrong])


def test_tokens_and_a_tied_head_are_refused():
    model = tiny("llama", num_hidden_layers=2, **TIED)
    fields = [dict(trainable_token_indices=[1]), dict(target_modules=["lm_head"], **APART)]
    with pytest.raises(UserError, match="adapter 0 trains tokens"):
        plan(model.params, make_parts(model, fields, 0))
    one = [dict(use_dora=True, target_modules=["embed_tokens"], **AS_ONE)]
    with pytest.raises(UserError, match="use_dora=true and ensure_weight_tying=true"):
        plan(model.params, make_parts(model, one, 0), "svd", rank=2)


def test_nearest_and_truncate_agree_with_svd():
    rng = np.random.default_rng(0)
    for shape in ((9, 23), (23, 9), (9, 9)):
        a, b = rng.standard_normal((shape[0], 6)), rng.standard_normal((6, shape[1]))
        values = np.linalg.svd(a @ b, compute_uv=False)
        for rank in (1, 4, 6):
            tail = np.linalg.norm(values[rank:])
            for left, right, lost, size in (
                svd.truncate(a, b, rank),
                svd.nearest(a @ b, rank),
            ):
                assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
                assert np.linalg.norm(a @ b - left @ right) == pytest.approx(tail, abs=1e-7)
                assert lost == pytest.approx(tail, abs=1e-7)
                assert size == pytest.approx(np.linalg.norm(values))
    zero = svd.nearest(np.zeros((3, 5)), 2)
    assert all(np.isfinite(part).all() for part in zero)
