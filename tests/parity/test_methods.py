"""Methods and inits against PEFT: logits, gradients of everything that trains, LoRA+'s training,
and what is left of the base under PiSSA and OLoRA.
"""

import copy
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft.optimizers
import pytest
import torch

from lora_jax import AdapterConfig, Config, lora, tree
from lora_jax.config import TrainConfig
from lora_jax.models import describe
from lora_jax.targets import find_trainable
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import make_train_step

from ..methods import PATTERNS, QUICK, ROWS, Row, make_batch

SEEDS = (0, 1)
# What PEFT has too, with its numbers: rates and frozen halves are no part of a forward pass.
PARITY = [
    *(
        "rsLoRA",
        "DoRA",
        "rsLoRA, DoRA",
        "patterns, layers, rsLoRA, DoRA",
        "bias all",
        "bias lora_only, a layer",
        "norm whole",
    ),
    *("one MLP whole", "embedding whole", "embedding whole, untied by it"),
    *("embedding whole, tied", "head whole", "head whole, untied by it", "embedding"),
    *("embedding, untied by it", "embedding, tied", "embedding, DoRA", "head"),
    *("head, DoRA, untied by it", "embedding and head, DoRA, untied", "tokens", "tokens, tied"),
    "embedding whole, head by LoRA",
]


@pytest.fixture
def oracle(tiny_llama):
    """`oracle(row, seed)`: the torch model of a row, and ours with the same weights."""

    def make(row: Row, seed: int):
        fields = {"tie_word_embeddings": row.tied, "attention_bias": row.bias}
        _, module = tiny_llama(seed, num_hidden_layers=3, **fields)
        tensors = {name: value.numpy() for name, value in module.state_dict().items()}
        model = describe(row.hf_config)
        params = {
            path: jnp.asarray(stack(path, leaf, lambda name: tensors[name]))
            for path, leaf in tree.flatten(model.params).items()
        }
        return module, model.replace(params=tree.unflatten(params))

    return make


def stack(path, leaf, read, ranks=None) -> np.ndarray:
    """A leaf of ours from tensors of torch, one for each slice, by name; padded where `ranks` says
    that slices have less than the leaf.
    """
    kind = path[-1].removeprefix("full_")
    suffix, turned = {
        "kernel": ("weight", True),
        "embedding": ("weight", False),
        "scale": ("weight", False),
        "bias": ("bias", False),
        "lora_a": ("lora_A", True),
        "lora_b": ("lora_B", True),
        "magnitude": ("lora_magnitude_vector", False),
        "trainable_tokens": ("token_adapter.trainable_tokens_delta", False),
    }[kind]
    names = tree.slice_names(path[:-1], leaf.shape)
    stacked = tree.stack_position(path) is not None
    out = np.zeros(leaf.shape, np.float32)
    for i, name in enumerate(names):
        tensor = read(f"{name}.{suffix}")
        if tensor is not None:
            tensor = tensor.T if turned else tensor
            place = out[i] if stacked else out
            place[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def to_peft(module, config: AdapterConfig) -> peft.PeftModel:
    given = dataclasses.asdict(config)
    for ours in (
        *("method", "init", "path", "freeze_a", "lora_plus_ratio"),
        *("calibration_batches", "eva_rho", "loftq_iter"),
        *("num_virtual_tokens", "prompt_init", "prompt_text", "prefix_gate"),
        *("d_initial", "projection_prng_key"),
    ):
        del given[ours]
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    given["ensure_weight_tying"] = bool(given["ensure_weight_tying"])
    given["init_lora_weights"] = True if config.init == "default" else config.init
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are what is tested
        theirs = peft.LoraConfig(
            task_type="CAUSAL_LM", **{names.get(key, key): value for key, value in given.items()}
        )
        return peft.get_peft_model(copy.deepcopy(module), theirs)


def trainable(peft_model) -> dict[str, torch.nn.Parameter]:
    """What trains in PEFT, by the name of the module of the base and what it is there."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            name = name.replace(".base_layer", "").replace(".modules_to_save", "")
            name = name.replace("lora_embedding_", "lora_")
            if "lora_" in name:
                name = name.removesuffix(".weight")
            assert name not in found
            found[name] = parameter
    return found


def ours_from(tensors, adapters) -> dict:
    """Our trainable tree with PEFT's numbers; every one of theirs is used."""
    used = set()

    def read(name):
        used.add(name)
        return tensors.get(name)

    leaves = {
        path: jnp.asarray(stack(path, leaf, read)) for path, leaf in tree.flatten(adapters).items()
    }
    assert set(tensors) <= used, set(tensors) - used
    return tree.unflatten(leaves)


def stir(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def arrays(parameters):
    return {name: value.detach().numpy().copy() for name, value in parameters.items()}


def drop_second_names(parameters) -> dict[str, str]:
    """Take those out whose numbers are another's, turned; the name of that other.

    PEFT's tied LoRA is two parameters over one storage, each with the gradient of its own use.
    """
    first, second = {}, {}
    for name, parameter in parameters.items():
        if (place := parameter.data_ptr()) in first:
            second[name] = first[place]
        first.setdefault(place, name)
    for name in second:
        del parameters[name]
    return second


@pytest.mark.long_table(6)
@pytest.mark.parametrize("name", PARITY)
def test_logits_and_gradients_are_those_of_peft(oracle, error, name):
    row, run = ROWS[name], None
    for seed in SEEDS:
        module, model = oracle(row, seed)
        theirs = to_peft(module, row.config)
        parameters = trainable(theirs)
        stir(parameters, seed)
        everything = dict(parameters)
        second = drop_second_names(parameters)
        assert bool(second) == (name == "embedding, tied")
        shapes = lora.shapes(model.params, row.config)
        adapters = ours_from(arrays(parameters), shapes)
        found = find_trainable(model.params, row.config)
        assert found.parameters == sum(parameter.numel() for parameter in parameters.values())
        tokens = make_batch(seed)["tokens"]
        weights = np.random.default_rng(seed).standard_normal((*tokens.shape, 97))
        weights = (weights / tokens.size**0.5).astype(np.float32)

        def score(adapters, params, tokens, weights, model=model):
            logits = model.apply(lora.bind(params, adapters, row.config), tokens)
            return jnp.sum(logits * weights), logits

        run = run or jax.jit(jax.grad(score, has_aux=True), compiler_options=QUICK)
        gradients, logits = run(adapters, model.params, tokens, weights)
        expected = theirs(input_ids=torch.tensor(tokens).long(), use_cache=False).logits
        (expected * torch.tensor(weights)).sum().backward()
        with torch.no_grad():
            plain = module(input_ids=torch.tensor(tokens).long(), use_cache=False).logits.numpy()
        expected = expected.detach().numpy()
        assert error(expected, plain) > 1e-2
        assert error(logits, expected) <= 1e-5
        of_theirs = {key: value.grad.numpy() for key, value in parameters.items()}
        for key, other in second.items():
            of_theirs[other] = of_theirs[other] + everything[key].grad.numpy().T
        of_theirs = tree.flatten(ours_from(of_theirs, shapes))
        whole = {weight.trained: weight.mask() for weight in found.whole}
        for path, gradient in tree.flatten(gradients).items():
            if path not in whole or whole[path].all():
                assert np.abs(of_theirs[path]).max() > 1e-3, path
            assert error(gradient, of_theirs[path]) <= 1e-5, path


INITS = {
    "PiSSA": Row({"init": "pissa"}),
    "PiSSA, rsLoRA, patterns": Row({"init": "pissa", "use_rslora": True, **PATTERNS}),
    "PiSSA, head": ROWS["PiSSA, head"],
    "PiSSA, DoRA": Row({"init": "pissa", "use_dora": True}),
    "OLoRA": Row({"init": "olora"}),
    "OLoRA, rsLoRA, patterns": Row({"init": "olora", "use_rslora": True, **PATTERNS}),
    "OLoRA, DoRA": ROWS["OLoRA, DoRA"],
}


@pytest.mark.long_table(3)
@pytest.mark.parametrize("row", INITS.values(), ids=INITS)
def test_what_is_left_of_the_base_and_the_first_update_are_those_of_peft(oracle, error, row):
    """Factors are the same up to signs, their products the same."""
    for seed in SEEDS:
        module, model = oracle(row, seed)
        theirs = to_peft(module, row.config)
        left = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value.numpy()
            for name, value in theirs.state_dict().items()
            if name.endswith(".base_layer.weight")
        }
        base, adapters = lora.init(jax.random.key(seed), model.params, row.config)
        tensors = ours_from(arrays(trainable(theirs)), tree.unflatten(
            {p: x for p, x in tree.flatten(adapters).items() if not p[-1].startswith("init_")}
        ))  # fmt: skip
        found = find_trainable(model.params, row.config)
        original, ours = tree.flatten(model.params), tree.flatten(base)
        small, expected = tree.flatten(adapters), tree.flatten(tensors)
        for target in found.targets:
            path = (*target.path, target.leaf)
            residual = stack(path, ours[path], left.get)
            chosen = np.asarray(target.ranks) > 0
            chosen = chosen if target.stacked else chosen[0]
            assert error(np.asarray(ours[path])[chosen], residual[chosen]) <= 1e-5
            assert error(residual[chosen], np.asarray(original[path])[chosen]) > 1e-2
            a, b = (np.asarray(small[(*target.path, n)]) for n in ("lora_a", "lora_b"))
            of_a, of_b = (expected[(*target.path, n)] for n in ("lora_a", "lora_b"))
            assert error(a @ b, of_a @ of_b) <= 1e-5
            assert error(np.abs(a), np.abs(of_a)) <= 1e-3
            assert error(np.abs(b), np.abs(of_b)) <= 1e-3
            if row.config.use_dora:
                magnitude = small[(*target.path, "magnitude")]
                assert error(magnitude, expected[(*target.path, "magnitude")]) <= 1e-5


def test_the_rule_of_orthogonal_is_that_of_peft(oracle):
    """The same deviation, halves without a product, and no odd rank."""
    row = Row({"init": "orthogonal", "target_modules": "all-linear", "rank": 8})
    module, model = oracle(row, 0)
    torch.manual_seed(0)
    parameters = arrays(trainable(to_peft(module, row.config)))
    _, adapters = lora.init(jax.random.key(0), model.params, row.config)
    theirs = tree.flatten(ours_from(parameters, adapters))
    small = tree.flatten(adapters)
    for part in ("lora_a", "lora_b"):
        pools = [
            np.concatenate([np.ravel(x) for path, x in leaves.items() if path[-1] == part])
            for leaves in (small, theirs)
        ]
        assert abs(pools[0].std() / pools[1].std() - 1) < 0.05
        assert abs(pools[0].mean()) < 0.05 * pools[0].std()
    odd = dataclasses.replace(row.config, rank=3)
    with pytest.raises(ValueError, match="even"):
        to_peft(module, odd)
    with pytest.raises(ValueError, match="init=orthogonal needs an even rank"):
        lora.init(jax.random.key(0), model.params, odd)


def test_gaussian_is_that_of_peft(oracle):
    row = Row({"init": "gaussian", "target_modules": "all-linear"})
    module, model = oracle(row, 0)
    torch.manual_seed(0)
    parameters = arrays(trainable(to_peft(module, row.config)))
    _, adapters = lora.init(jax.random.key(0), model.params, row.config)
    pools = [
        np.concatenate([np.ravel(x) for path, x in leaves.items() if path[-1] == "lora_a"])
        for leaves in (tree.flatten(adapters), tree.flatten(ours_from(parameters, adapters)))
    ]
    assert abs(pools[0].std() * 4 - 1) < 0.05 and abs(pools[1].std() * 4 - 1) < 0.05


def test_lora_plus_trains_as_in_peft(oracle, error):
    """Five steps of AdamW with rates by PEFT's own optimizer."""
    row = ROWS["LoRA+"]
    train = TrainConfig(
        batch_size=4, learning_rate=2e-4, schedule="constant", grad_clip=None, remat="none"
    )
    optimizer, step = make_optimizer(train, row.config), None
    for seed in SEEDS:
        module, model = oracle(row, seed)
        theirs = to_peft(module, row.config)
        parameters = trainable(theirs)
        stir(parameters, seed)
        adapters = lora.shapes(model.params, row.config)
        adapters = ours_from(arrays(parameters), adapters)
        state = optimizer.init(adapters)
        adamw = peft.optimizers.create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16.0
        )
        first = None
        for number in range(5):
            batch = make_batch(10 * seed + number)
            tokens, weights = (torch.tensor(batch[n]) for n in ("tokens", "loss_weights"))
            labels = torch.where(weights > 0, tokens.long(), -100)
            inputs = (adapters, state, model.params, batch, jax.random.key(number))
            if step is None:
                traced = make_train_step(model, Config(adapter=row.config, train=train), optimizer)
                step = traced.lower(*inputs).compile(QUICK)
            adapters, state, metrics = step(*inputs)
            adamw.zero_grad()
            loss = theirs(input_ids=tokens.long(), labels=labels).loss
            loss.backward()
            adamw.step()
            assert error(metrics["loss"], loss.item()) <= 1e-5
            first = loss.item() if first is None else first
        final = ours_from(arrays(parameters), adapters)
        for ours, expected in zip(jax.tree.leaves(adapters), jax.tree.leaves(final), strict=True):
            assert error(ours, expected) <= 1e-5
