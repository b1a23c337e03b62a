"""State dicts of loralib against its own modules."""

import jax
import loralib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from lora_jax import AdapterConfig, UserError, formats, lora

TOLERANCE = 1e-5
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
BIASED = UNTIED | dict(attention_bias=True)


def adapt(model, ranks, alpha, seed):
    """loralib's modules, with random factors, in place of those whose path ends as in `ranks`."""
    generator = torch.Generator().manual_seed(seed)
    for name, old in list(model.named_modules()):
        rank = next((rank for end, rank in ranks.items() if name.endswith(end)), None)
        if rank is None:
            continue
        options = dict(r=rank, lora_alpha=alpha, merge_weights=False)
        if isinstance(old, torch.nn.Embedding):
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, **options)
        else:
            bias = old.bias is not None
            new = loralib.Linear(old.in_features, old.out_features, bias=bias, **options)
            new.bias = old.bias
        new.weight = old.weight
        with torch.no_grad():
            for factor in (new.lora_A, new.lora_B):
                factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
        model.set_submodule(name, new)
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


CASES = {
    "linears": (UNTIED, {"q_proj": 4, "v_proj": 4}, "none"),
    "ranks": (TIED, {"layers.0.self_attn.q_proj": 2, "q_proj": 4, "down_proj": 4}, "none"),
    "embedding and head": (UNTIED, {"embed_tokens": 3, "lm_head": 2, "k_proj": 3}, "none"),
    "tied embedding": (TIED, {"embed_tokens": 3, "o_proj": 3}, "none"),
    "tied head": (TIED, {"lm_head": 3, "1.self_attn.o_proj": 3}, "none"),
    "bias of adapted": (BIASED, {"q_proj": 4}, "lora_only"),
    "bias of all": (BIASED, {"q_proj": 4, "1.mlp.up_proj": 4}, "all"),
}


@pytest.mark.parametrize(("base", "ranks", "bias"), CASES.values(), ids=CASES)
def test_its_modules_give_the_same_logits(tiny_llama, tmp_path, error, base, ranks, bias):
    for seed in (0, 1):
        directory, oracle = tiny_llama(seed, **base)
        model = formats.load(directory)
        tokens = np.random.default_rng(seed).integers(0, 97, (2, 13))
        before = torch_logits(oracle, tokens)
        adapted = adapt(oracle, ranks, 5, seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                owner = adapted.get_submodule(name.rpartition(".")[0])
                trains = bias == "all" or isinstance(owner, loralib.Linear)
                if bias != "none" and name.endswith(".bias") and trains:
                    parameter.add_(0.1)
        state = loralib.lora_state_dict(adapted, bias=bias)
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "l.st")
        given = AdapterConfig(alpha=5.0, rank=99, target_modules=["gate_proj"], dropout=0.1)
        adapters, config = formats.read_loralib(tmp_path / "l.st", model.params, given)
        assert (config.alpha, config.dropout, config.bias) == (5.0, 0.1, bias)
        modules = sorted(name.removesuffix(".lora_A") for name in state if "lora_A" in name)
        assert config.target_modules == modules
        expected = torch_logits(adapted, tokens)
        bound = jax.jit(lambda p, a, config=config: lora.bind(p, a, config))
        logits = jax.jit(model.apply)(bound(model.params, adapters), tokens)
        assert error(logits, expected) < TOLERANCE
        assert error(expected, before) > 1e-2


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
A, B = np.ones((3, 36), np.float32), np.ones((48, 3), np.float32)
PAIRS = {f"{name}.{part}": x for name in (Q0, Q1) for part, x in (("lora_A", A), ("lora_B", B))}


@pytest.fixture
def read(tiny_llama, tmp_path):
    """`read(tensors, base=UNTIED, **settings)`: what `read_loralib` gives."""

    def run(tensors, base=UNTIED, **settings):
        directory, _ = tiny_llama(**base)
        save_arrays(tensors, tmp_path / "lora.safetensors")
        params = formats.describe(directory).params
        return formats.read_loralib(
            tmp_path / "lora.safetensors", params, AdapterConfig(**settings)
        )

    return run


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.removeprefix("model."),
        lambda key: key.removeprefix("model.layers."),
        lambda key: f"base.{key}",
    ],
)
def test_paths_with_other_first_names_are_found(read, rename):
    adapters, config = read({rename(key): array for key, array in PAIRS.items()}, alpha=6.0)
    assert config.target_modules == [Q0, Q1]
    assert (config.rank, config.rank_pattern, config.bias) == (3, {}, "none")
    q_proj = adapters["model"]["layers"]["self_attn"]["q_proj"]
    assert (q_proj["lora_a"].shape, q_proj["lora_b"].shape) == ((2, 36, 3), (2, 3, 48))
    assert q_proj["lora_a"].all() and q_proj["lora_b"].all()


def test_the_commonest_rank_is_the_rank(read):
    more = {"lm_head.lora_A": np.ones((2, 36)), "lm_head.lora_B": np.ones((97, 2))}
    settings = dict(alpha_pattern={"lm_head": 4.0}, freeze_a=True, lora_plus_ratio=4.0)
    _, config = read(PAIRS | more, **settings)
    assert (config.rank, config.rank_pattern) == (3, {"lm_head": 2})
    assert {name: getattr(config, name) for name in settings} == settings


K = "model.layers.1.self_attn.k_proj"
BIG = np.ones((6, 36), np.float32)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            {f"{Q0}.lora_C": A, f"{Q0}.weight": A, "lora_A": A},
            [
                f"{Q0}.lora_C is none of: MODULE.lora_A, MODULE.lora_B, MODULE.bias",
                f"{Q0}.weight is none of",
                "lora_A is none of",
            ],
        ),
        (
            {"model.layers.0.self_attn.qproj.lora_A": A},
            ["qproj.lora_A fits no module that can have it. Did you mean", "self_attn.q_proj'?"],
        ),
        (
            {"k_proj.lora_A": A},
            [
                "k_proj.lora_A fits several modules: model.layers.0.self_attn.k_proj, "
                "model.layers.1.self_attn.k_proj, ..."
            ],
        ),
        ({f"{Q0}.bias": np.ones(48)}, [f"{Q0}.bias fits no module that can have it"]),
        ({"layers.0.self_attn.q_proj.lora_B": B}, [f"is a second lora_B of {Q0}"]),
        ({f"{K}.lora_A": A}, [f"{K} has a lora_A and no lora_B"]),
        ({f"{K}.lora_B": np.ones((16, 3))}, [f"{K} has a lora_B and no lora_A"]),
        (
            {f"{Q0}.lora_A": A.T.copy(), f"{Q1}.lora_B": B[:, :2].copy()},
            [
                f"{Q0}: lora_A (36, 3) and lora_B (48, 3), expected (r, 36) and (48, r)",
                f"{Q1}: lora_A (3, 36) and lora_B (48, 2), expected (r, 36) and (48, r)",
            ],
        ),
        (
            {f"{Q0}.lora_A": A[:0], f"{Q0}.lora_B": B[:, :0]},
            [f"{Q0}: lora_A (0, 36) and lora_B (48, 0), expected"],
        ),
        (
            {f"{Q0}.lora_A": np.ones((2, 2, 36))},
            [f"{Q0}: lora_A (2, 2, 36) and lora_B (48, 3), expected"],
        ),
        (
            {f"{Q0}.lora_A": BIG},
            [
                f"{Q0}: lora_A (6, 36) and lora_B (48, 3) are 2 groups of loralib's MergedLinear, "
                "which is not supported; save a lora_A and a lora_B of rank 3"
            ],
        ),
        ({f"{Q1}.lora_B": np.full((48, 3), np.inf)}, [f"{Q1}.lora_B holds numbers that are not"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(read, tmp_path, change, texts):
    with pytest.raises(UserError) as caught:
        read(PAIRS | change)
    for text in (f"{tmp_path / 'lora.safetensors'} does not fit the model", *texts):
        assert text in str(caught.value)


def test_biases_that_are_missing_or_misshapen_are_named(read):
    with pytest.raises(UserError, match=rf"{Q1}.bias is missing, expected \(48,\)"):
        read(PAIRS | {f"{Q0}.bias": np.ones(48)}, BIASED)
    with pytest.raises(UserError, match=rf"{Q1}.bias has shape \(4,\), expected \(48,\)"):
        read(PAIRS | {f"{Q0}.bias": np.ones(48), f"{Q1}.bias": np.ones(4)}, BIASED)
    with pytest.raises(UserError, match=r"layers.0.self_attn.k_proj.bias is missing"):
        read(PAIRS | {f"{K}.bias": np.ones(16)}, BIASED)


@pytest.mark.parametrize(
    ("tensors", "base", "settings", "text"),
    [
        ({f"{Q0}.bias": np.ones(48)}, BIASED, {}, "no lora_A in it"),
        (PAIRS, UNTIED, dict(use_rslora=True), "use_rslora=True, but .* holds plain LoRA"),
        (PAIRS, UNTIED, dict(use_dora=True), "use_dora=True, but"),
        (PAIRS, UNTIED, dict(modules_to_save=["norm"]), r"modules_to_save=\['norm'\], but"),
        (PAIRS, UNTIED, dict(trainable_token_indices=[1]), r"trainable_token_indices=\[1\], but"),
        (
            {"lm_head.lora_A": A, "lm_head.lora_B": np.ones((97, 3))},
            TIED,
            dict(ensure_weight_tying=True),
            "ensure_weight_tying=true, but the file adapts lm_head by itself",
        ),
        (PAIRS, UNTIED, dict(alpha=-1.0), "alpha=-1.0 must be above 0"),
    ],
)
def test_settings_that_contradict_the_file_are_named(read, tensors, base, settings, text):
    with pytest.raises(UserError, match=text):
        read(tensors, base, **settings)


def test_a_file_that_is_none_is_named(tiny_llama, tmp_path):
    params = formats.describe(tiny_llama()[0]).params
    with pytest.raises(UserError, match="none.safetensors is missing"):
        formats.read_loralib(tmp_path / "none.safetensors", params, AdapterConfig())
    (tmp_path / "torch.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="torch.pt is not a readable safetensors file"):
        formats.read_loralib(tmp_path / "torch.pt", params, AdapterConfig())
