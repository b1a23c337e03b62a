"""Adapters for vLLM: the profile that folds patterns in, and what vLLM cannot load."""

import copy
import json

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

from lora_jax import AdapterConfig, UserError, formats, lora, models
from lora_jax.targets import find_trainable
from lora_jax.tree import flatten, slice_names, unflatten

from ..families import FAMILIES, SMOLLM2
from .test_peft import (
    AS_ONE,
    BIASED,
    HEAD_A,
    HEAD_B,
    KO,
    OURS,
    PATTERNS,
    QV,
    SEEDS,
    TIED,
    TOLERANCE,
    UNTIED,
    P,
    make_fields,
    make_tokens,
    random_adapters,
    torch_logits,
)
from .test_peft import forward as forward
from .test_peft import logits as logits

SERVED = {
    "plain": (UNTIED, dict(target_modules=QV)),
    "patterns": (UNTIED, PATTERNS),
    "patterns, rslora, tied": (TIED, PATTERNS | dict(use_rslora=True)),
    "all modules by patterns": (
        UNTIED,
        dict(target_modules=["q_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5.0}),
    ),
    "pissa, rslora": (UNTIED, PATTERNS | dict(init="pissa", use_rslora=True, rank=3)),
    "pissa above a side": (
        UNTIED,
        dict(init="pissa", rank=12, target_modules=KO),
    ),
    "embedding and head": (UNTIED, dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "embedding as head": (TIED, AS_ONE | dict(rank_pattern={"q_proj": 2})),
}


def served(params, directory):
    """The params with what vLLM adds to them: one alpha / r of adapter_config.json for every pair
    of the file, whatever the patterns say.
    """
    content = json.loads((directory / "adapter_config.json").read_text())
    assert not (content["use_dora"] or content["modules_to_save"] or content["bias"] != "none")
    assert content["trainable_token_indices"] is None
    rank = content["r"]
    assert not content["use_rslora"]  # SGLang does not read it
    scale = content["lora_alpha"] / rank
    file = load_file(directory / "adapter_model.safetensors")
    leaves = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    for path, leaf in leaves.items():
        for i, name in enumerate(slice_names(path[:-1], leaf.shape)):
            part = "embedding_" if path[-1] == "embedding" else ""
            suffix = "" if part else ".weight"
            pair = [file.pop(f"{P}{name}.lora_{part}{x}{suffix}", None) for x in "AB"]
            if pair[0] is not None:
                place = leaf if leaf.ndim == 2 else leaf[i]
                place += scale * (pair[1] @ pair[0]).T
    return unflatten(leaves), file


@pytest.mark.parametrize(("base", "fields"), SERVED.values(), ids=SERVED)
def test_the_vllm_profile_gives_the_live_logits_without_patterns(
    tiny_llama, tmp_path, error, forward, logits, base, fields
):
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, **base)
        model = formats.load(directory)
        config, tokens = AdapterConfig(**make_fields(fields)), make_tokens(seed)
        adapters = random_adapters(model.params, config, seed)
        target = tmp_path / f"adapter{seed}"
        formats.write_adapter(
            target, adapters, model.params, config, base_model="org/base", profile="vllm"
        )
        content = json.loads((target / "adapter_config.json").read_text())
        assert (content["rank_pattern"], content["alpha_pattern"]) == ({}, {})
        for name, array in load_file(target / "adapter_model.safetensors").items():
            assert array.shape["lora_B" in name or "embedding_B" in name] == content["r"]
        params, rest = served(model.params, target)
        assert set(rest) == ({HEAD_A, HEAD_B} if config.ensure_weight_tying else set())
        live = logits(model, adapters, config, tokens)
        assert error(forward(model, params, tokens), live) < TOLERANCE
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), target)
        assert error(torch_logits(loaded, tokens), live) < TOLERANCE


def test_without_the_profile_vllm_would_scale_wrongly(tiny_llama, tmp_path, error, forward, logits):
    """So that the test above can fail; and only then there is something to say about it."""
    directory, _ = tiny_llama(**UNTIED)
    model, tokens = formats.load(directory), make_tokens(0)
    cut = OURS["pissa above a side"][1]  # some ranks are cut down there, and keep their scale
    for patterns, wrong in ((PATTERNS, True), (dict(target_modules=QV), False), (cut, False)):
        config = AdapterConfig(**make_fields(patterns))
        adapters = random_adapters(model.params, config, 0)
        target = tmp_path / str(len(str(patterns)))
        formats.write_adapter(target, adapters, model.params, config, base_model="org/base")
        params, _ = served(model.params, target)
        live = logits(model, adapters, config, tokens)
        assert (error(forward(model, params, tokens), live) > 1e-3) == wrong
        problems = formats.serving_problems(find_trainable(model.params, config))
        assert len(problems) == wrong
        assert all("--profile vllm" in problem for problem in problems)


def test_what_vllm_cannot_load_is_named_with_what_to_do(tiny_llama, tmp_path):
    directory, _ = tiny_llama(**BIASED)
    params = formats.describe(directory).params
    given = dict(
        use_dora=True, bias="all", modules_to_save=["lm_head"], trainable_token_indices=[3]
    )
    config = AdapterConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2}, **given)
    adapters = lora.shapes(params, config)
    with pytest.raises(UserError) as caught:
        formats.write_adapter(
            tmp_path / "adapter", adapters, params, config, base_model="base", profile="vllm"
        )
    problems = formats.serving_problems(find_trainable(params, config))
    assert str(caught.value).splitlines() == problems[:4]
    for name, value in given.items():
        assert any(
            f"{name}={value!r}; export a merged model with --format hf" in p for p in problems
        )
    assert "rank_pattern and alpha_pattern" in problems[4]
    with pytest.raises(UserError, match="profile='vlm' is not one of: vllm"):
        formats.write_adapter(
            tmp_path / "adapter", adapters, params, config, base_model="base", profile="vlm"
        )
    assert not (tmp_path / "adapter").exists()


def test_the_largest_rank_of_the_file_is_known_before_it_is_written(tiny_llama, tmp_path):
    directory, _ = tiny_llama(**UNTIED)
    model = formats.load(directory)
    cases = {
        "pissa": dict(init="pissa", rank=3, target_modules=QV),
        "pissa above a side": dict(init="pissa", rank=12, target_modules=KO),
        "patterns": PATTERNS,
    }
    for name, fields in cases.items():
        config = AdapterConfig(**make_fields(fields))
        adapters = random_adapters(model.params, config, 0)
        formats.write_adapter(
            tmp_path / name, adapters, model.params, config, base_model="org/base", profile="vllm"
        )
        content = json.loads((tmp_path / name / "adapter_config.json").read_text())
        found = find_trainable(model.params, config)
        assert formats.file_rank(found) == content["r"]
        assert content["r"] > config.rank or name == "patterns"


def test_ranks_that_vllm_does_not_take_are_refused(tmp_path):
    params = models.describe(SMOLLM2).params
    for fields in (dict(rank=520), dict(rank=260, init="pissa"), dict(rank=512)):
        config = AdapterConfig(alpha=8, target_modules=["q_proj"], **fields)
        problems = formats.serving_problems(find_trainable(params, config), "llama")
        assert len(problems) == (fields["rank"] != 512)
        assert all("rank in the file is 520, and vLLM takes up to 512" in x for x in problems)


EMBEDDINGS = ["embed_tokens", "lm_head"]
LACKS = {
    "llama": [],
    "qwen3": [],
    "olmo2": EMBEDDINGS[1:],
    "mistral": EMBEDDINGS,
    "qwen2": EMBEDDINGS,
    "gemma3_text": EMBEDDINGS,
}


@pytest.mark.parametrize("family", LACKS)
def test_embeddings_that_vllm_has_no_adapters_of_are_refused(tiny_llama, tmp_path, family):
    directory, _ = tiny_llama(family=family, tie_word_embeddings=False)
    params = formats.describe(directory).params
    config = AdapterConfig(target_modules=[*EMBEDDINGS, "q_proj"])
    found = find_trainable(params, config)
    problems = formats.serving_problems(found, family)
    lacks = LACKS[family]
    assert [problem.split()[5] for problem in problems] == lacks
    assert formats.serving_problems(found) == []
    plain = find_trainable(params, AdapterConfig(target_modules=["q_proj"]))
    assert formats.serving_problems(plain, family) == []
    if lacks:
        adapters = lora.shapes(params, config)
        with pytest.raises(UserError, match=f"no adapters of lm_head for model_type={family}"):
            formats.write_adapter(
                *(tmp_path / "x", adapters, params, config),
                **dict(base_model="base", source=directory, profile="vllm"),
            )


def test_an_embedding_that_is_the_head_needs_both(tiny_llama):
    for family, lacks in (("llama", 0), ("gemma", 2), ("olmo2", 1)):
        directory, _ = tiny_llama(family=family, tie_word_embeddings=True)
        params = formats.describe(directory).params
        found = find_trainable(params, AdapterConfig(**make_fields(AS_ONE)))
        assert len(formats.serving_problems(found, family)) == lacks


def test_families_and_routers_that_vllm_has_no_adapters_of_are_refused(tiny_model):
    for family, targets, text in (
        ("gpt2", ["c_attn"], "vLLM has no adapters for model_type=gpt2"),
        ("mixtral", ["gate"], "vLLM would ignore adapters of routers of model_type=mixtral"),
        ("mixtral", ["q_proj"], ""),
    ):
        directory, _ = tiny_model(family, **FAMILIES[family].fields)
        params = formats.describe(directory).params
        found = find_trainable(params, AdapterConfig(rank=4, target_modules=targets))
        problems = formats.serving_problems(found, family)
        assert len(problems) == bool(text) and "".join(problems).startswith(text)
