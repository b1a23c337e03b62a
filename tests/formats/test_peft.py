"""PEFT directories of everything that can train: ours in PEFT, PEFT's in ours, and vLLM's sum."""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax import AdapterConfig, UserError, formats, lora
from lora_jax.targets import find_trainable
from lora_jax.tree import flatten, unflatten

TOLERANCE = 1e-5
P = "base_model.model."
AS_ONE = dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
HEAD_A, HEAD_B = f"{P}lm_head.lora_A.weight", f"{P}lm_head.lora_B.weight"
EMBED_A = f"{P}model.embed_tokens.lora_embedding_A"
EMBED_B = f"{P}model.embed_tokens.lora_embedding_B"
SEEDS = (0, 1)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
BIASED = UNTIED | dict(attention_bias=True, mlp_bias=True)
QV, KO = ["q_proj", "v_proj"], ["k_proj", "o_proj"]
PATTERNS = dict(
    target_modules=["q_proj", "k_proj", "up_proj"],
    rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "up_proj": 1},
    alpha_pattern={"k_proj": 2.5, "up_proj": 9.0},
)

# name -> (base, fields of AdapterConfig); PEFT takes the same fields, but for the names of rank and
# alpha.
BOTH = {
    "dora": (UNTIED, dict(use_dora=True, target_modules=QV)),
    "dora, rslora, all-linear": (TIED, dict(use_dora=True, use_rslora=True)),
    "dora, patterns, one layer": (UNTIED, PATTERNS | dict(use_dora=True, layers_to_transform=[1])),
    "embedding": (UNTIED, dict(target_modules=["q_proj", "embed_tokens"])),
    "embedding, dora, rslora": (
        UNTIED,
        dict(target_modules=["q_proj", "embed_tokens"], use_dora=True, use_rslora=True),
    ),
    "embedding, tied": (TIED, dict(target_modules=["embed_tokens"], ensure_weight_tying=False)),
    "embedding as head": (
        TIED,
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "embedding as head, patterns": (
        TIED,
        dict(
            target_modules=["q_proj", "embed_tokens"],
            ensure_weight_tying=True,
            rank_pattern={"embed_tokens|lm_head": 2},
            alpha_pattern={"embed_tokens|lm_head": 3.0},
        ),
    ),
    "head as embedding": (
        TIED,
        dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True, use_rslora=True),
    ),
    "both as one": (
        TIED,
        dict(target_modules=r".*(lm_head|embed_tokens|q_proj)", ensure_weight_tying=True),
    ),
    "head": (UNTIED, dict(target_modules=["q_proj", "lm_head"], use_dora=True)),
    "head, tied": (TIED, dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=False)),
    "head and embedding apart, dora": (
        TIED,
        dict(
            target_modules=["q_proj", "lm_head", "embed_tokens"],
            ensure_weight_tying=False,
            use_dora=True,
        ),
    ),
    "bias all": (BIASED, dict(target_modules=["q_proj"], bias="all")),
    "bias of adapted": (BIASED, dict(target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "bias of one layer, dora": (
        BIASED,
        dict(target_modules=QV, bias="lora_only", layers_to_transform=[1], use_dora=True),
    ),
    "saved embedding": (UNTIED, dict(target_modules=QV, modules_to_save=["embed_tokens"])),
    "saved head": (UNTIED, dict(target_modules=QV, modules_to_save=["lm_head"])),
    "saved head, tied": (
        TIED,
        dict(target_modules=QV, modules_to_save=["lm_head"], ensure_weight_tying=False),
    ),
    "saved embedding, tied": (
        TIED,
        dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=False),
    ),
    "saved both apart": (
        TIED,
        dict(
            target_modules=QV,
            modules_to_save=["lm_head", "embed_tokens"],
            ensure_weight_tying=False,
        ),
    ),
    "saved embedding as head": (
        TIED,
        dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "saved head as embedding, dora": (
        TIED,
        dict(
            target_modules=QV,
            modules_to_save=["lm_head"],
            ensure_weight_tying=True,
            use_dora=True,
        ),
    ),
    "saved norms": (TIED, dict(target_modules=QV, modules_to_save=["input_layernorm"])),
    "saved mlp of a layer": (
        BIASED,
        dict(target_modules="all-linear", modules_to_save=["layers.1.mlp"]),
    ),
    "tokens": (UNTIED, dict(target_modules=QV, trainable_token_indices=[5, 3, 90])),
    "tokens, tied, dora": (
        TIED,
        dict(target_modules=QV, trainable_token_indices=[5, 3, 90], use_dora=True),
    ),
}
# Without a counterpart in PEFT's own files: its pissa and olora adapters stand on another base, and
# its modules_to_save=["norm"] takes the norms of the layers too.
OURS = {
    "pissa": (UNTIED, dict(init="pissa", target_modules=QV)),
    "pissa, rslora, patterns": (TIED, PATTERNS | dict(init="pissa", use_rslora=True, rank=3)),
    "pissa above a side": (
        UNTIED,
        dict(init="pissa", rank=12, target_modules=KO),
    ),
    "olora, rslora above a side": (
        UNTIED,
        PATTERNS | dict(init="olora", rank=10, use_rslora=True, use_dora=True),
    ),
    "olora of the embedding as head": (
        TIED,
        dict(init="olora", target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    ),
    "freeze_a": (TIED, dict(freeze_a=True)),
    "saved norm": (TIED, dict(target_modules=QV, modules_to_save=["norm"])),
}
# What only PEFT writes in this way.
THEIRS = {
    "norm by its end": (TIED, dict(target_modules=QV, modules_to_save=["norm"])),
    "saved and adapted": (
        BIASED,
        dict(
            target_modules=["q_proj", "down_proj"],
            modules_to_save=["1.mlp"],
            layers_to_transform=[0, 1],
            bias="lora_only",
        ),
    ),
    "patterns of head and embedding": (
        TIED,
        dict(
            target_modules=["embed_tokens", "q_proj"],
            ensure_weight_tying=True,
            rank_pattern={"embed_tokens": 2, "lm_head": 2},
            alpha_pattern={"lm_head": 3.0, "embed_tokens": 3.0},
        ),
    ),
    "bias without any": (TIED, dict(target_modules=QV, bias="all")),
    "bias of adapted without any": (
        TIED | dict(mlp_bias=True),
        dict(target_modules=QV, bias="lora_only"),
    ),
    "tokens of the embedding": (
        UNTIED,
        dict(target_modules=QV, trainable_token_indices={"embed_tokens": [2, 50, 7]}),
    ),
    "tokens of both": (
        TIED,
        dict(target_modules=QV, trainable_token_indices={"embed_tokens": [2], "lm_head": [2]}),
    ),
}
# Raised by PEFT for its own files of tied models that keep no tie.
IGNORED = pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"
)


# Compiling takes most of the time here; the numbers stay what they are.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def forward():
    """`forward(model, params, tokens)`: logits, compiled once for every form of the tree."""
    compiled = {}

    def run(model, params, tokens):
        kind = json.dumps(model.hf_config)
        apply = compiled.setdefault(kind, jax.jit(model.apply, compiler_options=QUICKLY))
        return apply(params, tokens)

    return run


@pytest.fixture(scope="module")
def logits(forward):
    """`logits(model, adapters, config, tokens)` of the bound model."""
    compiled = {}

    def run(model, adapters, config, tokens):
        bind = compiled.setdefault(
            json.dumps(model.hf_config) + repr(config),
            jax.jit(
                lambda p, a: lora.bind(lora.residual(p, a, config), a, config),
                compiler_options=QUICKLY,
            ),
        )
        return forward(model, bind(model.params, adapters), tokens)

    return run


def random_adapters(params, config, seed):
    """Every leaf random, whole weights around those of the model; padding zero."""
    masks, frozen = {}, flatten(params)
    for target in find_trainable(params, config).targets:
        mask = target.rank_mask()
        masks |= {(*target.path, leaf): mask for leaf in ("lora_a", "init_a")}
        masks |= {(*target.path, leaf): mask.swapaxes(-1, -2) for leaf in ("lora_b", "init_b")}
    rng, leaves = np.random.default_rng(seed), {}
    for path, leaf in flatten(lora.shapes(params, config)).items():
        start = 1 if path[-1] == "magnitude" else 0
        if path[-1].startswith("full_"):
            start = frozen.get((*path[:-1], path[-1].removeprefix("full_")), 0)
        noise = 0.1 * rng.standard_normal(leaf.shape) * masks.get(path, 1)
        leaves[path] = jnp.asarray(start + noise, jnp.float32)
    return unflatten(leaves)


def fresh_peft_model(oracle, fields):
    names = {"rank": "r", "alpha": "lora_alpha"}
    given = {names.get(name, name): value for name, value in fields.items() if value is not None}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **given)
    return peft.get_peft_model(copy.deepcopy(oracle), config).eval()


def move(peft_model, seed):
    """Every trained parameter, from where it stands."""
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def save(peft_model, directory, **options):
    with warnings.catch_warnings():  # that it adds the frozen weight of adapted embeddings
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        peft_model.save_pretrained(directory, **options)


def make_tokens(seed):
    return np.random.default_rng(seed).integers(0, 97, (2, 13))


def torch_logits(module, tokens):
    with torch.no_grad():
        return module(torch.tensor(tokens), use_cache=False).logits.numpy()


def make_fields(fields):
    return dict(rank=4, alpha=6.0, target_modules="all-linear") | fields


@IGNORED
@pytest.mark.parametrize(("base", "fields"), (BOTH | OURS).values(), ids=BOTH | OURS)
def test_written_directories_load_in_peft(tiny_llama, tmp_path, error, logits, base, fields):
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **base)
        model = formats.load(directory)
        config, tokens = AdapterConfig(**make_fields(fields)), make_tokens(seed)
        adapters = random_adapters(model.params, config, seed)
        live = logits(model, adapters, config, tokens)
        first, second = tmp_path / f"first{seed}", tmp_path / f"second{seed}"
        formats.write_adapter(first, adapters, model.params, config, base_model="org/base")
        assert error(live, torch_logits(oracle, tokens)) > 1e-2

        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), first)
        assert error(live, torch_logits(loaded, tokens)) < TOLERANCE

        again, read = formats.read_adapter(first, model.params)
        formats.write_adapter(second, again, model.params, read, base_model="org/base")
        for file in first.iterdir():
            assert (second / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("base", "fields"),
    [OURS[name] for name in ("pissa, rslora, patterns", "olora, rslora above a side")],
)
def test_adapters_of_changing_inits_are_plain_ones_of_the_original_base(
    tiny_llama, tmp_path, error, logits, base, fields
):
    directory, _ = tiny_llama(**base)
    model = formats.load(directory)
    config, tokens = AdapterConfig(**make_fields(fields)), make_tokens(0)
    adapters = random_adapters(model.params, config, 0)
    formats.write_adapter(tmp_path / "adapter", adapters, model.params, config, base_model="base")
    again, read = formats.read_adapter(tmp_path / "adapter", model.params)
    assert (read.init, read.rank) == ("default", 2 * config.rank)
    live = logits(model, adapters, config, tokens)
    assert error(logits(model, again, read, tokens), live) < TOLERANCE


@IGNORED
@pytest.mark.parametrize(("base", "fields"), (BOTH | THEIRS).values(), ids=BOTH | THEIRS)
def test_directories_of_peft_load_here(tiny_llama, tmp_path, error, logits, base, fields):
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **base)
        model = formats.load(directory)
        peft_model = move(fresh_peft_model(oracle, make_fields(fields)), seed)
        save(peft_model, tmp_path / f"adapter{seed}")
        adapters, config = formats.read_adapter(tmp_path / f"adapter{seed}", model.params)
        tokens = make_tokens(seed)
        expected = torch_logits(peft_model, tokens)
        assert error(logits(model, adapters, config, tokens), expected) < TOLERANCE
        assert error(expected, torch_logits(oracle, tokens)) > 1e-2


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_an_adapter_that_peft_converts_from_pissa_loads_here(tiny_llama, tmp_path, error, logits):
    """As the error for one that it did not convert says."""
    directory, oracle = tiny_llama(**UNTIED)
    model, tokens = formats.load(directory), make_tokens(0)
    fields = make_fields(dict(init_lora_weights="pissa", target_modules=QV))
    peft_model = fresh_peft_model(oracle, fields)
    config = peft_model.peft_config["default"]
    config.init_lora_weights = True
    save(peft_model, tmp_path / "start")
    config.init_lora_weights = "pissa"
    save(move(peft_model, 0), tmp_path / "raw")
    with pytest.raises(UserError, match="init_lora_weights='pissa'.*path_initial_model_for_weight"):
        formats.read_adapter(tmp_path / "raw", model.params)
    start = str(tmp_path / "start")
    save(peft_model, tmp_path / "adapter", path_initial_model_for_weight_conversion=start)
    adapters, read = formats.read_adapter(tmp_path / "adapter", model.params)
    assert read.rank == 8
    expected = torch_logits(peft_model, tokens)
    assert error(expected, torch_logits(oracle, tokens)) > 1e-2
    assert error(logits(model, adapters, read, tokens), expected) < TOLERANCE


def test_modules_to_save_are_read_by_the_rule_of_peft(tiny_llama, tmp_path):
    """There an entry is the end of any path, so that `norm` is `input_layernorm` too."""
    directory, oracle = tiny_llama()
    fields = make_fields(dict(target_modules=QV, modules_to_save=["norm", "nothing"]))
    save(move(fresh_peft_model(oracle, fields), 0), tmp_path / "adapter")
    _, config = formats.read_adapter(tmp_path / "adapter", formats.describe(directory).params)
    layers = ("input_layernorm", "post_attention_layernorm")
    expected = [f"model.layers.{i}.{name}" for i in (0, 1) for name in layers]
    assert config.modules_to_save == [*expected, "model.norm"]


def test_method_full_and_a_tied_dora_have_no_form_in_peft(tiny_llama, tmp_path):
    directory, _ = tiny_llama(**TIED)
    params = formats.describe(directory).params
    tied = AdapterConfig(
        target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True, rank=4
    )
    for config, text in (
        (AdapterConfig(method="full"), "method=full trains the model itself.*--format hf"),
        (tied, "use_dora=true and ensure_weight_tying=true: PEFT gives.*--format hf"),
    ):
        adapters = lora.shapes(params, config)
        with pytest.raises(UserError, match=text):
            formats.write_adapter(
                tmp_path / "adapter", adapters, params, config, base_model="org/base"
            )
        assert len(formats.peft_problems(find_trainable(params, config))) == 1
    assert not (tmp_path / "adapter").exists()
    assert formats.peft_problems(find_trainable(params, AdapterConfig(use_dora=True))) == []
