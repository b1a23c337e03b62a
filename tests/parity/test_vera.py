"""VeRA against PEFT: projections, logits, gradients, training, and files in both directions."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

from lora_jax import AdapterConfig, UserError, formats, lora, tree
from lora_jax.adapters.vera import projections
from lora_jax.config import AdapterConfig as Settings
from lora_jax.config import read_json

from ..methods import QUICK, Row, make_batch
from .test_methods import arrays, oracle, stack, stir

__all__ = ["oracle"]  # a fixture

SEEDS = (0, 1)
VERA = {"method": "vera", "rank": 5, "target_modules": ["q_proj", "down_proj"], "d_initial": 0.5}
ROWS = {
    "two widths": Row(VERA),
    "all linear, a rank above sides": Row(
        {"method": "vera", "rank": 40, "projection_prng_key": 2**33 + 7}
    ),
    "bias lora_only, a layer": Row(
        VERA | {"bias": "lora_only", "layers_to_transform": [1]}, bias=True
    ),
    "bias all, head whole": Row(VERA | {"bias": "all", "modules_to_save": ["lm_head"]}, bias=True),
}


def to_peft(module, config: AdapterConfig, **fields) -> peft.PeftModel:
    return peft.get_peft_model(
        copy.deepcopy(module),
        peft.VeraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            target_modules=config.target_modules,
            layers_to_transform=config.layers_to_transform,
            projection_prng_key=config.projection_prng_key,
            d_initial=config.d_initial,
            bias=config.bias.replace("lora", "vera"),
            modules_to_save=config.modules_to_save,
            **fields,
        ),
    )


def trainable(theirs) -> dict[str, torch.nn.Parameter]:
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            found[name.replace(".base_layer", "").replace(".modules_to_save", "")] = parameter
    return found


def ours_from(tensors, theirs, shapes) -> dict:
    """Our trainable tree with PEFT's numbers; every one of theirs is used."""
    shared = {"vera_a": theirs.base_model.vera_A, "vera_b": theirs.base_model.vera_B}
    used, leaves = set(), {}

    def read(name):
        used.add(name)
        return tensors.get(name)

    for path, leaf in tree.flatten(shapes).items():
        if path[-1] in shared:
            leaves[path] = jnp.asarray(shared[path[-1]]["default"].numpy().T)
        elif path[-1].startswith("lambda"):
            names = tree.slice_names(path[:-1], leaf.shape)
            found = [read(f"{name}.vera_{path[-1]}") for name in names]
            empty = np.zeros(leaf.shape[1:], np.float32)
            rows = [empty if one is None else one for one in found]
            leaves[path] = jnp.asarray(np.stack(rows) if len(leaf.shape) > 1 else found[0])
        else:
            leaves[path] = jnp.asarray(stack(path, leaf, read))
    assert set(tensors) <= used, set(tensors) - used
    return tree.unflatten(leaves)


@pytest.mark.parametrize("key", [0, 7, 2**32 + 5])
def test_projections_are_the_numbers_of_peft(oracle, key):
    module, model = oracle(ROWS["two widths"], 0)
    config = Settings(**VERA | {"projection_prng_key": key})
    theirs = to_peft(module, config).base_model
    ours = lora.init(jax.random.key(3), model.params, config)[1]
    for name, matrix in (("vera_a", theirs.vera_A), ("vera_b", theirs.vera_B)):
        np.testing.assert_array_equal(ours[name], matrix["default"].numpy().T)


def run_peft(theirs, tokens) -> torch.Tensor:
    return theirs(input_ids=torch.tensor(tokens).long(), use_cache=False).logits


@pytest.mark.parametrize("name", ROWS)
def test_logits_and_gradients_are_those_of_peft(oracle, error, name):
    row, run = ROWS[name], None
    for seed in SEEDS:
        module, model = oracle(row, seed)
        theirs = to_peft(module, row.config)
        parameters = trainable(theirs)
        stir(parameters, seed)
        found = lora.find_trainable(model.params, row.config)
        adapters = ours_from(arrays(parameters), theirs, found.shapes)
        assert found.parameters == sum(parameter.numel() for parameter in parameters.values())
        tokens = make_batch(seed)["tokens"]
        weights = np.random.default_rng(seed).standard_normal((*tokens.shape, 97))
        weights = (weights / tokens.size**0.5).astype(np.float32)

        def score(adapters, params, tokens, weights, model=model, found=found):
            logits = model.apply(lora.bind(params, adapters, found), tokens)
            return jnp.sum(logits * weights), logits

        run = run or jax.jit(jax.grad(score, has_aux=True), compiler_options=QUICK)
        gradients, logits = run(adapters, model.params, tokens, weights)
        expected = run_peft(theirs, tokens)
        (expected * torch.tensor(weights)).sum().backward()
        plain = run_peft(module, tokens).detach().numpy()
        assert error(expected.detach().numpy(), plain) > 1e-2
        assert error(logits, expected.detach().numpy()) <= 1e-5
        slopes = {key: value.grad.numpy() for key, value in parameters.items()}
        wanted = tree.flatten(ours_from(slopes, theirs, found.shapes))
        for path, slope in tree.flatten(gradients).items():
            if path[-1] in found.shared:
                assert not np.any(slope)
            else:
                assert np.any(slope) and error(slope, wanted[path]) <= 1e-5, path


def test_five_steps_are_those_of_peft(oracle, error):
    row = ROWS["two widths"]
    rate, step = 1e-2, None
    optimizer = optax.adamw(rate, weight_decay=0.01)
    for seed in SEEDS:
        module, model = oracle(row, seed)
        theirs = to_peft(module, row.config)
        parameters = trainable(theirs)
        found = lora.find_trainable(model.params, row.config)
        adapters = lora.init(jax.random.key(0), model.params, found)[1]
        fresh = tree.flatten(ours_from(arrays(parameters), theirs, found.shapes))
        for path, leaf in tree.flatten(adapters).items():
            np.testing.assert_array_equal(leaf, fresh[path])

        def loss(adapters, params, tokens, model=model, found=found):
            logits = model.apply(lora.bind(params, adapters, found), tokens)
            chosen = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return chosen.mean()

        def update(adapters, state, params, tokens, loss=loss):
            value, slopes = jax.value_and_grad(loss)(adapters, params, tokens)
            moves, state = optimizer.update(slopes, state, adapters)
            frozen = {name: jnp.zeros_like(moves[name]) for name in ("vera_a", "vera_b")}
            return optax.apply_updates(adapters, moves | frozen), state, value

        step = step or jax.jit(update, compiler_options=QUICK)
        state, torch_adamw = optimizer.init(adapters), torch.optim.AdamW(
            parameters.values(), lr=rate, weight_decay=0.01
        )  # fmt: skip
        for i in range(5):
            tokens = make_batch(10 * seed + i)["tokens"]
            adapters, state, value = step(adapters, state, model.params, tokens)
            logits = run_peft(theirs, tokens)[:, :-1].reshape(-1, 97)
            expected = torch.nn.functional.cross_entropy(
                logits, torch.tensor(tokens[:, 1:]).long().reshape(-1)
            )
            torch_adamw.zero_grad()
            expected.backward()
            torch_adamw.step()
            assert error(value, expected.detach().numpy()) <= 1e-5
        trained = tree.flatten(ours_from(arrays(parameters), theirs, found.shapes))
        for path, leaf in tree.flatten(adapters).items():
            assert error(leaf, trained[path]) <= 1e-5, path


@pytest.mark.parametrize("saved", [True, False], ids=["projections", "key alone"])
@pytest.mark.parametrize("name", ROWS)
def test_files_go_both_ways(oracle, error, tmp_path, name, saved):
    row = ROWS[name]
    module, model = oracle(row, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A")
        theirs = to_peft(module, row.config, save_projection=saved)
    stir(trainable(theirs), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters, config = formats.read_adapter(tmp_path / "theirs", model.params)
    assert config.trains_vera and config.rank == row.config.rank
    assert config.projection_prng_key == row.config.projection_prng_key
    tokens = make_batch(0)["tokens"]
    ours = model.apply(lora.bind(model.params, adapters, config), tokens)
    expected = run_peft(theirs, tokens).detach().numpy()
    assert error(ours, expected) <= 1e-5

    formats.write_adapter(tmp_path / "a", adapters, model.params, config, base_model="org/base")
    formats.write_adapter(tmp_path / "b", adapters, model.params, config, base_model="org/base")
    again, same = formats.read_adapter(tmp_path / "a", model.params)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    found, other = (lora.find_trainable(model.params, one) for one in (config, same))
    assert (found.targets, found.leaves) == (other.targets, other.leaves)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / "a")
    assert error(run_peft(back, tokens).detach().numpy(), expected) <= 1e-6
    merged = lora.merge(lora.bind(model.params, adapters, config))
    theirs = back.merge_and_unload()
    assert error(model.apply(merged, tokens), run_peft(theirs, tokens).detach().numpy()) <= 1e-5


def test_a_directory_that_peft_cannot_hold_is_refused(oracle, tmp_path):
    _, model = oracle(ROWS["two widths"], 0)
    config = Settings(**VERA | {"target_modules": ["embed_tokens", "q_proj"]})
    adapters = lora.shapes(model.params, config)
    with pytest.raises(UserError, match="in PEFT it is for linear layers only.*embed_tokens"):
        formats.write_adapter(tmp_path / "x", adapters, model.params, config, base_model="base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_prng_key": None}, "projection_prng_key=None is not an integer"),
        ({"d_initial": "a"}, "d_initial='a' is not a number"),
        ({"vera_dropout": "a"}, "vera_dropout='a' is not a number"),
        ({"layers_pattern": "h"}, "not supported: layers_pattern='h'"),
        ({"r": 4}, "has shape"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
    ids=str,
)
def test_damaged_settings_are_refused(oracle, edit_json, tmp_path, change, message):
    _, model = oracle(ROWS["two widths"], 0)
    config = ROWS["two widths"].config
    adapters = lora.init(jax.random.key(0), model.params, config)[1]
    formats.write_adapter(tmp_path / "x", adapters, model.params, config, base_model="base")
    edit_json(tmp_path / "x" / "adapter_config.json", **change)
    with pytest.raises(UserError, match=message):
        formats.read_adapter(tmp_path / "x", model.params)


def test_dropout_and_start_are_in_the_file(oracle, tmp_path):
    _, model = oracle(ROWS["two widths"], 0)
    config = Settings(**VERA | {"dropout": 0.25, "projection_prng_key": 3})
    adapters = lora.init(jax.random.key(0), model.params, config)[1]
    formats.write_adapter(tmp_path / "x", adapters, model.params, config, base_model="base")
    content = read_json(tmp_path / "x" / "adapter_config.json")
    assert content["vera_dropout"] == 0.25 and content["d_initial"] == 0.5
    assert content["projection_prng_key"] == 3 and content["save_projection"] is True
    assert formats.read_adapter(tmp_path / "x", model.params)[1].dropout == 0.25


def test_the_rank_is_256_unless_another_is_given():
    assert AdapterConfig(method="vera").rank == 256
    assert AdapterConfig(method="vera", rank=8).rank == 8
    assert AdapterConfig().rank == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"init": "pissa"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha": 4.0},
        {"freeze_a": True},
        {"trainable_token_indices": [1]},
        {"prefix_gate": True},
        {"ensure_weight_tying": True},
    ],
    ids=str,
)
def test_settings_of_other_methods_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name}=.*is for method="):
        AdapterConfig(method="vera", **fields)


def test_its_own_settings_are_refused_elsewhere():
    for method in ("lora", "prompt"):
        with pytest.raises(UserError, match="d_initial=0.5 is for method=vera"):
            AdapterConfig(method=method, d_initial=0.5)
    with pytest.raises(UserError, match="d_initial=0 must be above 0"):
        AdapterConfig(method="vera", d_initial=0)
    with pytest.raises(UserError, match="projection_prng_key=-1 must be"):
        AdapterConfig(method="vera", projection_prng_key=-1)


def test_projections_depend_on_key_and_widths_alone():
    shapes = {"vera_a": (7, 3), "vera_b": (3, 5)}
    one, other = projections(0, shapes), projections(1, shapes)
    assert {name: matrix.shape for name, matrix in one.items()} == shapes
    assert not np.array_equal(one["vera_a"], other["vera_a"])
    np.testing.assert_array_equal(one["vera_b"], projections(0, shapes)["vera_b"])
