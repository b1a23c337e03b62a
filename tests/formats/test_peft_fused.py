"""PEFT directories of parts of fused projections, which PEFT knows only as a whole, and of GPT-2,
whose linears are Conv1D: ours in PEFT, PEFT's in ours.
"""

import copy
import json

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.formats.peft_tensors import adapted_modules
from lora_jax.targets import find_trainable

from ..families import FAMILIES
from .test_peft import QUICKLY, fresh_peft_model, move, random_adapters, save, torch_logits

TOLERANCE = 1e-5
IGNORED = pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"
)
QKV = [f"qkv_proj.{part}" for part in "qkv"]
ATTENTION = [f"c_attn.{part}" for part in "qkv"]
UNTIED = dict(tie_word_embeddings=False)

# name -> (family, fields of its config, fields of AdapterConfig)
PARTS = {
    "one part": ("phi3", {}, dict(target_modules=["qkv_proj.k", "o_proj"])),
    "two of equal scale": (
        "phi3",
        {},
        dict(target_modules=["qkv_proj.k", "gate_up_proj.up", "qkv_proj.q"]),
    ),
    "two, rsLoRA": ("gpt2", {}, dict(target_modules=["c_attn.q", "c_attn.v"], use_rslora=True)),
    "other ranks and scales": (
        "phi3",
        {},
        dict(
            target_modules=[*QKV, "o_proj"],
            rank_pattern={"q": 1, r"1\.self_attn\.qkv_proj\.v": 7},
            alpha_pattern={"k": 1.5, "o_proj": 3.0},
            use_rslora=True,
        ),
    ),
    "parts here, the whole there": (
        "phi3",
        {},
        dict(
            target_modules=[
                "model.layers.0.self_attn.qkv_proj",
                "model.layers.1.self_attn.qkv_proj.v",
                "model.layers.1.self_attn.qkv_proj.k",
            ]
        ),
    ),
    "DoRA of all parts": (
        "phi3",
        {},
        dict(target_modules=[*QKV, "gate_up_proj.up", "gate_up_proj.gate"], use_dora=True),
    ),
    "DoRA, rsLoRA, a layer": (
        "gpt2",
        {},
        dict(
            target_modules=ATTENTION,
            use_dora=True,
            use_rslora=True,
            layers_to_transform=[1],
            rank_pattern={"c_attn.k": 2},
        ),
    ),
    "PiSSA of parts": (
        "gpt2",
        {},
        dict(
            target_modules=ATTENTION[:2],
            init="pissa",
            use_rslora=True,
            rank_pattern={"c_attn.k": 2},
        ),
    ),
    "OLoRA of parts above a side": (
        "phi3",
        {},
        dict(target_modules=[*QKV, "o_proj"], init="olora", rank=12, alpha=6.0),
    ),
}
GPT2 = {
    "all-linear": (dict(), dict(target_modules="all-linear")),
    "c_proj, rsLoRA, patterns": (
        dict(),
        dict(
            target_modules=["c_proj", "c_attn"],
            use_rslora=True,
            rank_pattern={r"1\.mlp\.c_proj": 2},
            alpha_pattern={"c_attn": 11.0},
        ),
    ),
    "DoRA, a layer": (
        dict(),
        dict(target_modules=["mlp.c_proj"], use_dora=True, layers_to_transform=[1]),
    ),
    "bias all": (dict(), dict(target_modules=["c_fc"], bias="all")),
    "bias of adapted": (dict(), dict(target_modules=["attn.c_proj"], bias="lora_only")),
    "Conv1D whole": (
        dict(),
        dict(target_modules=["c_attn"], modules_to_save=["0.mlp.c_fc", "ln_f"]),
    ),
    "embeddings": (
        dict(),
        dict(target_modules=["c_attn", "wte", "wpe"], ensure_weight_tying=False),
    ),
    "embeddings whole": (
        UNTIED,
        dict(target_modules=["c_attn"], modules_to_save=["wte", "wpe", "lm_head"]),
    ),
    "tokens": (dict(), dict(target_modules=["c_attn"], trainable_token_indices=[3, 50])),
}


@pytest.fixture
def tiny(tiny_model):
    def make(family, seed=0, **fields):
        layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
        return tiny_model(family, seed, **FAMILIES[family].size | {layers: 2} | fields)

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


def check_in_peft(tiny, tmp_path, error, family, base, fields, **options):
    """That our directory gives our logits in PEFT, and is written again as it was read."""
    directory, oracle = tiny(family, **base)
    model, config, tokens = formats.load(directory), make_config(fields), make_tokens(0)
    adapters = random_adapters(model.params, config, 0)
    first, second = tmp_path / "first", tmp_path / "second"
    formats.write_adapter(first, adapters, model.params, config, base_model="org/base", **options)
    live = live_logits(model, adapters, config, tokens)
    assert error(live, torch_logits(oracle, tokens)) > 1e-2
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), first)
    assert error(live, torch_logits(loaded, tokens)) < TOLERANCE
    again, read = formats.read_adapter(first, model.params)
    formats.write_adapter(second, again, model.params, read, base_model="org/base", **options)
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes()
    return json.loads((first / "adapter_config.json").read_text())


@pytest.mark.parametrize(("family", "base", "fields"), PARTS.values(), ids=PARTS)
def test_parts_load_in_peft_as_one_adapter_of_the_whole(
    tiny, tmp_path, error, family, base, fields
):
    content = check_in_peft(tiny, tmp_path, error, family, base, fields)
    assert content["fan_in_fan_out"] == (family == "gpt2")
    assert not {name.rpartition(".")[2] for name in content["target_modules"]} & {*"qkv", "up"}


@pytest.mark.parametrize("rslora", [False, True])
def test_equal_parts_have_rank_and_alpha_of_their_number(tiny, rslora):
    directory, _ = tiny("phi3")
    fields = dict(target_modules=[*QKV, "gate_up_proj.up", "o_proj"], use_rslora=rslora)
    found = find_trainable(formats.describe(directory).params, make_config(fields))
    modules = adapted_modules(found)
    alpha = 6 * (3**0.5 if rslora else 3)
    assert modules["model.layers.1.self_attn.qkv_proj"] == (12, pytest.approx(alpha))
    assert modules["model.layers.1.mlp.gate_up_proj"] == (4, 6)
    assert modules["model.layers.0.self_attn.o_proj"] == (4, 6)
    (problem,) = formats.serving_problems(found)
    assert "--profile vllm" in problem


def test_the_vllm_profile_folds_parts_too(tiny, tmp_path, error):
    _, base, fields = PARTS["other ranks and scales"]
    content = check_in_peft(tiny, tmp_path, error, "phi3", base, fields, profile="vllm")
    assert (content["rank_pattern"], content["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize(
    ("family", "fields", "text"),
    [
        (
            "phi3",
            dict(target_modules=["qkv_proj.k", "qkv_proj.q"]),
            "PEFT's DoRA is over all of model.layers.0.self_attn.qkv_proj, of which v is not",
        ),
        (
            "gpt2",
            dict(target_modules=["transformer.h.1.attn.c_attn.v"]),
            "PEFT's DoRA is over all of transformer.h.1.attn.c_attn, of which q, k is not adapted",
        ),
    ],
)
def test_dora_of_some_parts_has_no_form_in_peft(tiny, tmp_path, family, fields, text):
    directory, _ = tiny(family)
    params = formats.describe(directory).params
    config = make_config(fields | dict(use_dora=True))
    problems = formats.peft_problems(find_trainable(params, config))
    assert len(problems) == 1 and text in problems[0] and "--format hf" in problems[0]
    with pytest.raises(UserError) as caught:
        adapters = lora.shapes(params, config)
        formats.write_adapter(tmp_path / "x", adapters, params, config, base_model="base")
    assert str(caught.value) == problems[0]


@IGNORED
@pytest.mark.parametrize(("base", "fields"), GPT2.values(), ids=GPT2)
def test_adapters_of_gpt2_load_in_peft(tiny, tmp_path, error, base, fields):
    content = check_in_peft(tiny, tmp_path, error, "gpt2", base, fields)
    assert content["fan_in_fan_out"] is True


READ = {name: GPT2[name] for name in GPT2 if name not in ("tokens", "bias of adapted")}


@IGNORED
@pytest.mark.parametrize(("base", "fields"), READ.values(), ids=READ)
def test_adapters_of_peft_for_gpt2_load_here(tiny, tmp_path, error, base, fields):
    if fields["target_modules"] == "all-linear":
        fields = dict(target_modules=["c_attn", "c_proj", "c_fc"])
    directory, oracle = tiny("gpt2", 1, **base)
    given = dict(rank=4, alpha=6.0, fan_in_fan_out=True) | fields
    theirs = move(fresh_peft_model(oracle, given), 1)
    save(theirs, tmp_path / "adapter")
    model, tokens = formats.load(directory), make_tokens(1)
    adapters, config = formats.read_adapter(tmp_path / "adapter", model.params)
    expected = torch_logits(theirs, tokens)
    assert error(expected, torch_logits(oracle, tokens)) > 1e-2
    assert error(live_logits(model, adapters, config, tokens), expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is")
def test_a_head_beside_conv1d_loads_in_peft(tiny, tmp_path, error):
    """With a warning: PEFT has one field for both, and looks at the modules in the end."""
    fields = dict(target_modules=["c_attn", "lm_head"])
    check_in_peft(tiny, tmp_path, error, "gpt2", UNTIED, fields)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_peft_cannot_keep_the_embedding_of_gpt2_tied(tiny, field):
    directory, _ = tiny("gpt2")
    params = formats.describe(directory).params
    fields = dict(target_modules=["c_attn"], ensure_weight_tying=True)
    config = make_config(fields | {field: ["wte"]})
    (problem,) = formats.peft_problems(find_trainable(params, config))
    assert problem == (
        "ensure_weight_tying=true: PEFT keeps an output head tied to an embedding that is called "
        "embed_tokens only, and this is transformer.wte; export with --format hf, or set it to "
        "false"
    )
    apart = make_config(fields | {field: ["wte"], "ensure_weight_tying": False})
    assert formats.peft_problems(find_trainable(params, apart)) == []


def test_conv1d_lies_in_the_file_as_peft_has_it(tiny, tmp_path):
    """Factors in the usual order, a whole weight untransposed."""
    directory, _ = tiny("gpt2")
    model = formats.load(directory)
    config = make_config(dict(target_modules=["c_attn"], modules_to_save=["1.mlp.c_fc"]))
    adapters = random_adapters(model.params, config, 0)
    formats.write_adapter(tmp_path / "x", adapters, model.params, config, base_model="base")
    shapes = {
        k: v.shape for k, v in load_file(tmp_path / "x" / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model.transformer.h.1"
    assert shapes[f"{prefix}.attn.c_attn.lora_A.weight"] == (4, 36)
    assert shapes[f"{prefix}.attn.c_attn.lora_B.weight"] == (108, 4)
    assert shapes[f"{prefix}.mlp.c_fc.weight"] == (36, 144)
