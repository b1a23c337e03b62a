"""PEFT directories of routers and stacks of experts, which are parameters there: ours in PEFT,
PEFT's in ours, and what has no form in such a file.
"""

import copy
import json

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.targets import find_trainable
from lora_jax.tree import flatten

from ..families import FAMILIES
from .test_peft import QUICKLY, fresh_peft_model, move, random_adapters, save, torch_logits

TOLERANCE = 1e-5
# PEFT says that patterns for parameters match no module and are ignored, and then applies them.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
P, LAYER = "base_model.model.", "model.layers.1.mlp"

# name -> (family, fields of AdapterConfig, target_parameters in the file)
OURS = {
    "both stacks": (
        "mixtral",
        dict(target_modules=BOTH),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ),
    "everything, rsLoRA": (
        "qwen3_moe",
        dict(target_modules=r".*(_proj|gate)", use_rslora=True),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
    ),
    "all-linear, orthogonal": (
        "mixtral",
        dict(target_modules="all-linear", init="orthogonal", dropout=0.1),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ),
    "one stack": ("qwen3_moe", dict(target_modules=["down_proj"]), ["mlp.experts.down_proj"]),
    "the other, of a layer": (
        "mixtral",
        dict(target_modules=["q_proj", "gate_up_proj"], layers_to_transform=[1]),
        ["model.layers.1.mlp.experts.gate_up_proj"],
    ),
    "router": ("mixtral", dict(target_modules=["gate", "v_proj"]), ["mlp.gate.weight"]),
    "layers that differ, patterns, rsLoRA": (
        "qwen3_moe",
        dict(
            target_modules=[
                "q_proj",
                "gate",
                "gate_up_proj",
                "model.layers.1.mlp.experts.down_proj",
            ],
            rank_pattern={"gate": 2, r"0\.mlp\.experts\.gate_up_proj": 7, "q_proj": 1},
            alpha_pattern={"experts.down_proj": 2.5, "q_proj": 9.0, "mlp.gate": 11.0},
            use_rslora=True,
        ),
        [
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.gate.weight",
            "model.layers.1.mlp.experts.down_proj",
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.gate.weight",
        ],
    ),
    "parts, of other ranks and scales": (
        "mixtral",
        dict(
            target_modules=["gate_up_proj.up", "gate_up_proj.gate", "down_proj", "k_proj"],
            rank_pattern={"up": 2},
            alpha_pattern={"gate": 1.5},
        ),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ),
    "a part, PiSSA, patterns": (
        "qwen3_moe",
        dict(
            target_modules=["gate_up_proj.up", "down_proj"],
            init="pissa",
            rank_pattern={r"1\.mlp\.experts\.down_proj": 1, r"0\.mlp\.experts\.gate_up_proj.up": 3},
        ),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ),
    "PiSSA above a side": (
        "qwen3_moe",
        dict(target_modules=["down_proj"], init="pissa", rank=20, use_rslora=True),
        ["mlp.experts.down_proj"],
    ),
    "experts whole": (
        "mixtral",
        dict(target_modules=["q_proj", "gate"], modules_to_save=["0.mlp.experts"]),
        ["mlp.gate.weight"],
    ),
    "all of a layer whole": (
        "mixtral",
        dict(target_modules=["v_proj"], modules_to_save=["1.mlp"]),
        None,
    ),
    "biases, both stacks and the router": (
        "gpt_oss",
        dict(target_modules=["gate_up_proj", "down_proj", "router"], bias="all"),
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight"],
    ),
    "biases, a stack of a layer, PiSSA": (
        "gpt_oss",
        dict(target_modules=["q_proj", "1.mlp.experts.gate_up_proj"], bias="all", init="pissa"),
        ["model.layers.1.mlp.experts.gate_up_proj"],
    ),
    "biases of adapted modules": (
        "gpt_oss",
        dict(target_modules=["q_proj", "down_proj"], bias="lora_only"),
        ["mlp.experts.down_proj"],
    ),
    "experts in and out, and sinks, whole": (
        "gpt_oss",
        dict(target_modules=["0.self_attn.q_proj"], modules_to_save=["experts", "1.self_attn"]),
        None,
    ),
}
# name -> (family, target_modules, target_parameters, other fields of PEFT's config)
THEIRS = {
    "all-linear": ("mixtral", "all-linear", None, {}),
    "all-linear, rsLoRA": ("qwen3_moe", "all-linear", None, dict(use_rslora=True)),
    "both stacks, no module": (
        "qwen3_moe",
        [],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        {},
    ),
    "a stack": ("mixtral", ["q_proj"], ["gate_up_proj"], {}),
    "layers that differ, patterns": (
        "mixtral",
        ["k_proj", "q_proj"],
        ["mlp.gate.weight", "experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"],
        dict(
            rank_pattern={"gate_up_proj": 3, "q_proj": 1, "gate.weight": 2},
            alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 5, "down_proj": 7, "gate": 9},
        ),
    ),
    "modules of a layer, parameters of all": (
        "qwen3_moe",
        ["q_proj", "v_proj"],
        ["down_proj", "gate.weight"],
        dict(layers_to_transform=[1], exclude_modules=["v_proj", "mlp.gate"]),
    ),
    "a linear by its parameter": (
        "mixtral",
        [],
        ["v_proj.weight"],
        dict(rank_pattern={"v_proj.weight": 2}),
    ),
    "experts and router whole": (
        "qwen3_moe",
        ["q_proj"],
        None,
        dict(modules_to_save=["mlp.experts", "1.mlp.gate"]),
    ),
    "biases, stack and router": (
        "gpt_oss",
        ["o_proj"],
        ["mlp.experts.gate_up_proj", "mlp.router.weight"],
        dict(bias="all"),
    ),
    "biases of adapted modules": (
        "gpt_oss",
        ["o_proj"],
        ["mlp.experts.down_proj"],
        dict(bias="lora_only"),
    ),
    "experts in and out whole": ("gpt_oss", ["q_proj"], None, dict(modules_to_save=["experts"])),
}


@pytest.fixture
def tiny(tiny_model):
    def make(family, seed=0):
        size = FAMILIES[family].size
        return tiny_model(family, seed, **size | dict(num_hidden_layers=2))

    return make


def make_config(fields):
    return AdapterConfig(**dict(rank=4, alpha=6.0) | fields)


def make_tokens(seed):
    return np.random.default_rng(seed).integers(0, 97, (2, 11))


def live_logits(model, adapters, config, tokens):
    @jax.jit
    def run(params, adapters):
        base = lora.residual(params, adapters, config)
        return model.apply(lora.bind(base, adapters, config), tokens)

    return run.lower(model.params, adapters).compile(QUICKLY)(model.params, adapters)


@pytest.mark.parametrize(("family", "fields", "parameters"), OURS.values(), ids=OURS)
def test_written_directories_load_in_peft(tiny, tmp_path, error, family, fields, parameters):
    directory, oracle = tiny(family)
    model, config, tokens = formats.load(directory), make_config(fields), make_tokens(0)
    adapters = random_adapters(model.params, config, 0)
    first, second = tmp_path / "first", tmp_path / "second"
    formats.write_adapter(first, adapters, model.params, config, base_model="org/base")
    content = json.loads((first / "adapter_config.json").read_text())
    assert content["target_parameters"] == parameters
    live = live_logits(model, adapters, config, tokens)
    assert error(live, torch_logits(oracle, tokens)) > 1e-2

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), first)
    assert error(live, torch_logits(loaded, tokens)) < TOLERANCE

    again, read = formats.read_adapter(first, model.params)
    assert read.dropout == 0
    formats.write_adapter(second, again, model.params, read, base_model="org/base")
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("family", "modules", "parameters", "fields"), THEIRS.values(), ids=THEIRS)
def test_directories_of_peft_load_here(tiny, tmp_path, error, family, modules, parameters, fields):
    directory, oracle = tiny(family, 1)
    given = dict(rank=4, alpha=6, target_modules=modules, target_parameters=parameters) | fields
    theirs = move(fresh_peft_model(oracle, given), 1)
    save(theirs, tmp_path / "adapter")
    model, tokens = formats.load(directory), make_tokens(1)
    adapters, config = formats.read_adapter(tmp_path / "adapter", model.params)
    expected = torch_logits(theirs, tokens)
    assert error(expected, torch_logits(oracle, tokens)) > 1e-2
    assert error(live_logits(model, adapters, config, tokens), expected) < TOLERANCE
    trained = sum(value.numel() for value in theirs.parameters() if value.requires_grad)
    assert find_trainable(model.params, config).parameters == trained


def test_layout_is_expert_major_in_a_and_expert_fastest_in_b(tiny, tmp_path):
    """The tensors one by one, so that two mistakes cannot undo each other."""
    directory, _ = tiny("mixtral")
    params = formats.describe(directory).params
    config = make_config(dict(target_modules=BOTH, rank=3))
    adapters = random_adapters(formats.load(directory).params, config, 0)
    formats.write_adapter(tmp_path / "adapter", adapters, params, config, base_model="base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    leaves = flatten(adapters)
    for stack, wrapper in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
        path = ("model", "layers", "mlp", "experts", stack)
        a, b = (np.asarray(leaves[(*path, leaf)])[1] for leaf in ("lora_a", "lora_b"))
        stored_a, stored_b = (tensors[f"{P}{LAYER}.{wrapper}.lora_{x}.weight"] for x in "AB")
        experts, rank = 5, 3
        for expert in range(experts):
            for k in range(rank):
                np.testing.assert_array_equal(stored_a[expert * rank + k], a[expert, :, k])
                np.testing.assert_array_equal(stored_b[:, k * experts + expert], b[expert, k])


def problems_of(tiny, **fields):
    directory, _ = tiny("mixtral")
    params = formats.describe(directory).params
    found = find_trainable(params, make_config(fields))
    return params, found, formats.peft_problems(found)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            dict(target_modules="all-linear", use_dora=True),
            "use_dora=true and target_modules='all-linear': PEFT has no DoRA for routers and "
            "stacks of experts, and these are adapted: model.layers.mlp.experts.down_proj, "
            "model.layers.mlp.experts.gate_up_proj; export with --format hf, or leave one out",
        ),
        (
            dict(target_modules=["gate", "q_proj"], use_dora=True),
            "and these are adapted: model.layers.mlp.gate; export with --format hf",
        ),
        (
            dict(target_modules=["q_proj"], modules_to_save=["experts.down_proj"]),
            "modules_to_save=['experts.down_proj']: in PEFT model.layers.0.mlp.experts.down_proj "
            "is a parameter of model.layers.0.mlp.experts, which is saved in full; name that",
        ),
    ],
)
def test_what_has_no_form_in_peft_is_named_with_what_to_do(tiny, tmp_path, fields, text):
    params, found, problems = problems_of(tiny, **fields)
    assert len(problems) == 1 and text in problems[0]
    adapters = lora.shapes(params, found.config)
    with pytest.raises(UserError) as caught:
        formats.write_adapter(tmp_path / "x", adapters, params, found.config, base_model="base")
    assert str(caught.value) == problems[0]
    for harmless in (
        dict(target_modules=["q_proj"], use_dora=True),
        dict(target_modules=["q_proj"], modules_to_save=["mlp.experts", "gate"]),
        dict(target_modules="all-linear", dropout=0.3, use_rslora=True),
    ):
        assert problems_of(tiny, **harmless)[2] == []


def test_vllm_cannot_load_stacks_of_experts(tiny, tmp_path):
    params, found, _ = problems_of(tiny, target_modules=["experts.down_proj"])
    (problem,) = formats.serving_problems(found)
    assert "vLLM cannot load adapters of experts (target_modules=['experts.down_proj'])" in problem
    assert problem.endswith("export a merged model with --format hf")
    adapters = lora.shapes(params, found.config)
    with pytest.raises(UserError, match="vLLM cannot load adapters of experts"):
        formats.write_adapter(
            tmp_path / "x", adapters, params, found.config, base_model="base", profile="vllm"
        )
    assert formats.serving_problems(problems_of(tiny, target_modules=["q_proj"])[1]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            dict(target_parameters=["mlp.expert.down_proj"]),
            "not supported: target_parameters=['mlp.expert.down_proj']: the model has no such",
        ),
        (
            dict(target_parameters=["norm.weight", "down_proj"]),
            "['norm.weight', 'down_proj']: model.norm.weight is no linear weight",
        ),
        (dict(target_parameters="down_proj"), "target_parameters='down_proj' is not a list"),
        (dict(target_parameters=None, target_modules=None), "missing: target_modules"),
        (
            dict(target_parameters=["mlp.experts.gate_up_proj"]),
            f"{P}{LAYER}.experts.lora_A.weight has shape (20, 40), expected (20, 36)",
        ),
        (
            dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
            f"missing {P}{LAYER}.experts.base_layer.lora_A.weight (20, 36)",
        ),
        (
            dict(target_parameters=["down_proj", "mlp.gate.weight"]),
            f"missing {P}{LAYER}.gate.lora_B.weight (5, 4)",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tiny, tmp_path, edit_json, changes, text):
    directory, _ = tiny("mixtral")
    params = formats.describe(directory).params
    config = make_config(dict(target_modules=["down_proj"]))
    adapters = random_adapters(formats.load(directory).params, config, 0)
    formats.write_adapter(tmp_path / "x", adapters, params, config, base_model="base")
    formats.read_adapter(tmp_path / "x", params)
    edit_json(tmp_path / "x" / "adapter_config.json", **changes)
    with pytest.raises(UserError) as caught:
        formats.read_adapter(tmp_path / "x", params)
    assert text in str(caught.value)


def test_adapters_of_single_experts_are_named(tiny, tmp_path):
    """As PEFT saved them before transformers stacked the experts."""
    directory, _ = tiny("mixtral")
    params = formats.describe(directory).params
    config = make_config(dict(target_modules=["down_proj"]))
    adapters = random_adapters(formats.load(directory).params, config, 0)
    formats.write_adapter(tmp_path / "x", adapters, params, config, base_model="base")
    file = tmp_path / "x" / "adapter_model.safetensors"
    key = f"{P}model.layers.0.block_sparse_moe.experts.3.w2.lora_A.weight"
    save_file({key: np.zeros((4, 40), np.float32)}, file)
    with pytest.raises(UserError, match="for every single expert.*load it in PEFT and save it"):
        formats.read_adapter(tmp_path / "x", params)
