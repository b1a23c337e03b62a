"""EVA, LoRA-GA and LoftQ against PEFT on the same batch, and against numpy."""

import copy

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import loftq_utils

from lora_jax import lora, tree
from lora_jax.models import describe
from lora_jax.quantize import dequantize, quantize
from lora_jax.targets import find_trainable

from ..methods import Row, calibrate_on, make_batch, tiny_model
from .test_methods import stack

SEEDS = (0, 1)
EVA = {"init": "eva", "target_modules": "all-linear"}
GA = Row({"init": "lora_ga", "rank": 9, "alpha": 6.0, "use_rslora": True})


@pytest.fixture
def oracle(tiny_llama):
    def make(row: Row, seed: int, decay: float = 1.0):
        """With a decay below 1 the inputs of some modules vary along few directions."""
        _, module = tiny_llama(seed, num_hidden_layers=3, tie_word_embeddings=row.tied)
        layers = module.model.layers
        with torch.no_grad():
            layers[1].input_layernorm.weight *= decay ** torch.arange(36)
            layers[2].post_attention_layernorm.weight *= decay ** (torch.arange(36) / 2)
        tensors = {name: value.numpy() for name, value in module.state_dict().items()}
        model = describe(row.hf_config)
        params = {
            path: jnp.asarray(stack(path, leaf, tensors.get))
            for path, leaf in tree.flatten(model.params).items()
        }
        return module.eval(), model.replace(params=tree.unflatten(params))

    return make


def padded_batch(seed):
    """Rows of different lengths; padding is no segment."""
    batch = make_batch(seed, rows=5, time=17)
    for row, length in enumerate((17, 9, 13, 17, 11)):
        for name in ("segment_ids", "loss_weights"):
            batch[name][row, length:] = 0
    return batch


def for_torch(batch):
    tokens, weights = (torch.tensor(batch[name]) for name in ("tokens", "loss_weights"))
    return {
        "input_ids": tokens.long(),
        "attention_mask": torch.tensor(batch["segment_ids"]).long(),
        "labels": torch.where(weights > 0, tokens.long(), -100),
    }


def inputs_of(module, names, batch):
    """What goes into the linears for tokens that the loss counts, by numpy in float64, centred."""
    seen, counted = {}, torch.tensor(batch["loss_weights"] > 0)
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(name, given[0][counted].double().numpy())
        )
        for name in names
    ]
    with torch.no_grad():
        module(**for_torch(batch))
    for hook in hooks:
        hook.remove()
    return {name: x - x.mean(axis=0) for name, x in seen.items()}


def explained(x, directions):
    """The share of the variance in the span of orthonormal columns."""
    return np.sum((x @ np.asarray(directions, np.float64)) ** 2) / np.sum(x**2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook:UserWarning")
def test_eva_explains_what_pefts_directions_explain(oracle, error):
    row = Row(EVA)
    for seed in SEEDS:
        module, model = oracle(row, seed)
        batch = padded_batch(seed)
        config = peft.LoraConfig(
            r=row.config.rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
            + ["down_proj"],
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=1.0, tau=1.0 - 1e-6),
        )
        theirs = get_eva_state_dict(module, [for_torch(batch)], config, show_progress_bar=False)
        calibrate = calibrate_on(model, row, batch)
        base, adapters = lora.init(jax.random.key(seed), model.params, row.config, calibrate)
        assert base is model.params
        small, seen = tree.flatten(adapters), inputs_of(module, list(theirs), batch)
        for target in find_trainable(model.params, row.config).targets:
            a = np.asarray(small[(*target.path, "lora_a")])
            assert not np.any(small[(*target.path, "lora_b")])
            for i, name in enumerate(target.names):
                x = seen[name]
                values, right = np.linalg.svd(x)[1:]
                best = np.sum(values[:4] ** 2) / np.sum(values**2)
                assert best < 0.9
                assert abs(explained(x, a[i]) - best) <= 1e-5
                assert abs(explained(x, theirs[name].T) - best) <= 1e-3  # by random projections
                # Of angles between the two: sigma_4 and sigma_5 are apart.
                cosines = np.linalg.svd(theirs[name].numpy() @ a[i], compute_uv=False)
                assert cosines.min() > 0.99
                assert error(a[i].T @ a[i], np.eye(4)) <= 1e-5
                assert np.abs(right[:4] @ a[i]).max(axis=0).min() > 0.99


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("rho", [1.5, 2.0])
def test_ranks_go_where_peft_moves_them(oracle, rho):
    row = Row(EVA | {"eva_rho": rho, "rank_pattern": {"down_proj": 2}, "alpha": 6.0})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    module, model = oracle(row, 0, decay=0.5)
    batch = padded_batch(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        rank_pattern={"down_proj": 2},
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=1.0 - 1e-6),
    )
    adapted = peft.get_peft_model(copy.deepcopy(module), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(adapted, [for_torch(batch)], show_progress_bar=False)
    expected = {
        name.removeprefix("base_model.model."): (part.r["default"], part.scaling["default"])
        for name, part in adapted.named_modules()
        if hasattr(part, "lora_A")
    }
    calibrate = calibrate_on(model, row, batch)
    config = lora.redistribute(jax.random.key(0), model.params, row.config, calibrate)
    targets = find_trainable(model.params, config).targets
    found = {
        name: (rank, alpha / rank)
        for target in targets
        for name, rank, alpha in zip(target.names, target.ranks, target.alphas, strict=True)
        if rank
    }
    assert sum(rank for rank, _ in found.values()) == 3 * (6 * 4 + 2)
    assert found.keys() == expected.keys()
    # Inputs that several modules share tie; PEFT breaks ties as its sort does.
    differ = {name for name in found if found[name][0] != expected[name][0]}
    assert len(differ) <= 2, {name: (found[name], expected[name]) for name in differ}
    assert len({rank for rank, _ in found.values()}) > 2
    np.testing.assert_allclose(
        [found[name][1] for name in found], [expected[name][1] for name in found], rtol=1e-6
    )
    _, adapters = lora.init(jax.random.key(0), model.params, config, calibrate)
    shapes = lora.shapes(model.params, config)
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook:UserWarning")
def test_lora_ga_is_that_of_peft(oracle, error):
    """At rank 9 PEFT's randomised singular vectors of these gradients are exact. Signs are free."""
    for seed in SEEDS:
        module, model = oracle(GA, seed)
        batch = padded_batch(seed)
        config = peft.LoraConfig(
            r=GA.config.rank,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(),
        )
        preprocess_loraga(module, config, lambda: module(**for_torch(batch)).loss.backward())  # noqa: B023
        theirs = peft.get_peft_model(copy.deepcopy(module), config)
        state = {
            name.removeprefix("base_model.model.").replace(".default", ""): value.detach().numpy()
            for name, value in theirs.state_dict().items()
        }
        calibrate = calibrate_on(model, GA, batch)
        base, adapters = lora.init(jax.random.key(seed), model.params, GA.config, calibrate)
        small, left = tree.flatten(adapters), tree.flatten(base)
        for target in find_trainable(model.params, GA.config).targets:
            scale = GA.config.alpha / GA.config.rank**0.5
            for i, name in enumerate(target.names):
                of_a, of_b = (state[f"{name}.lora_{part}.weight"].T for part in "AB")
                a, b = (np.asarray(small[(*target.path, n)][i]) for n in ("lora_a", "lora_b"))
                signs_a = np.sign(np.sum(a * of_a, axis=0))
                signs_b = np.sign(np.sum(b * of_b, axis=1))
                assert np.abs(of_b).max() > 1e-3
                size = np.abs(of_b).max()
                assert error(a * signs_a, of_a) <= 1e-4
                assert error(b * signs_b[:, None] / size, of_b / size) <= 1e-4
                kernel = np.asarray(left[target.weight][i])
                original = module.get_submodule(name).weight.detach().numpy().T
                assert error(kernel + scale * a @ b, original) <= 1e-6
                taken = scale * (a * signs_a) @ (b * signs_b[:, None])
                assert error(original - taken, state[f"{name}.base_layer.weight"].T) <= 1e-5


# LoftQ


WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}


def lost(weight, base, a, b):
    return np.linalg.norm(weight - base - np.asarray(a, np.float64) @ np.asarray(b, np.float64))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """PEFT's LoftQ knows no CPU; bitsandbytes does."""

    def elsewhere(method):
        def to(self, *args, **kwargs):
            return method(self, *("cpu" if x == "cuda" else x for x in args), **{
                name: "cpu" if x == "cuda" else x for name, x in kwargs.items()
            })  # fmt: skip

        return to

    monkeypatch.setattr(torch.Tensor, "to", elsewhere(torch.Tensor.to))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", elsewhere(bitsandbytes.nn.Params4bit.to))
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)


@pytest.mark.parametrize("rounds", [1, 4])
def test_loftq_loses_as_little_as_pefts(on_a_cpu, rounds):
    """Where alpha = rank, as PEFT's start leaves the scale out. Its scales are not quantised again,
    which moves a weight by less than a thousandth.
    """
    fields = {"init": "loftq", "loftq_iter": rounds, "rank": 8, "alpha": 8.0}
    row = Row(fields)
    for seed in SEEDS:
        model = tiny_model(row.hf_config | WIDE, seed)
        base, adapters = lora.init(jax.random.key(0), model.params, row.config, scheme="nf4")
        small, left = tree.flatten(adapters), tree.flatten(base)
        assert (base is model.params) == (rounds == 1)
        for path, original in tree.flatten(model.params).items():
            if path[:-1] + ("lora_a",) not in small:
                continue
            own = dequantize(quantize(left[path], "nf4"))
            naive = dequantize(quantize(original, "nf4"))
            a, b = (small[(*path[:-1], n)] for n in ("lora_a", "lora_b"))
            for i in range(2):
                weight = np.asarray(original[i], np.float64)
                given = torch.tensor(np.ascontiguousarray(weight.T), dtype=torch.float32)
                theirs, lora_a, lora_b = loftq_utils.loftq_init(given, 4, 8, rounds)
                expected = lost(weight, theirs.numpy().T, lora_a.numpy().T, lora_b.numpy().T)
                found = lost(weight, own[i], a[i], b[i])
                plain = np.linalg.norm(weight - naive[i])
                assert abs(found / expected - 1) <= (0.003 if rounds == 1 else 0.03)
                assert found < 0.95 * plain


def loftq_reference(weight, scheme, rank, rounds):
    """The algorithm on one matrix, by numpy."""
    product = np.zeros_like(weight)
    for _ in range(rounds):
        before = product
        base = np.asarray(dequantize(quantize(jnp.asarray(weight - before), scheme)))
        left, values, right = np.linalg.svd(weight - base, full_matrices=False)
        product = (left[:, :rank] * values[:rank]) @ right[:rank]
    return base, before, product


@pytest.mark.parametrize(("scheme", "rounds"), [("nf4", 1), ("nf4", 3), ("int8", 2)])
def test_loftq_is_the_algorithm_at_every_scale_rank_and_layer(error, scheme, rounds):
    fields = {"init": "loftq", "loftq_iter": rounds, "use_rslora": True}
    patterns = {"rank_pattern": {r"2\.self_attn\.q_proj": 2}, "layers_to_transform": [0, 2]}
    row = Row(fields | patterns)
    model = tiny_model(row.hf_config)
    base, adapters = lora.init(jax.random.key(0), model.params, row.config, scheme=scheme)
    small, left = tree.flatten(adapters), tree.flatten(base)
    for target in find_trainable(model.params, row.config).targets:
        scales = target.scales(True)
        a, b = (np.asarray(small[(*target.path, n)]) for n in ("lora_a", "lora_b"))
        for i, rank in enumerate(target.ranks):
            original = np.asarray(tree.flatten(model.params)[target.weight][i])
            quantized, before, product = loftq_reference(original, scheme, rank, rounds)
            kernel = np.asarray(left[target.weight][i])
            assert not np.any(a[i][:, rank:]) and not np.any(b[i][rank:])
            if rank == 0:
                np.testing.assert_array_equal(kernel, original)
                continue
            size = np.abs(product).max()
            assert error(kernel, original - before) <= 1e-5
            # A code next to a tie may fall to either side.
            assert np.linalg.norm(scales[i] * a[i] @ b[i] - product) <= 0.02 * np.linalg.norm(
                product
            )
            assert size > 1e-4
            found = np.asarray(dequantize(quantize(left[target.weight][i], scheme)))
            assert lost(original, found, scales[i] * a[i], b[i]) <= 1.001 * lost(
                original, quantized, product, np.eye(len(product[0]))
            )
