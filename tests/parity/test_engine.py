"""Mixed batches of an engine against PEFT and transformers on exported adapters: 64 greedy tokens
and their log-probabilities.
"""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch

from lora_jax import AdapterConfig, formats, lora
from lora_jax.generate import Engine, Request, for_decoding

from ..families import FAMILIES
from .test_bank import export, log_probabilities

COUNT = 64
ADAPTERS = {
    "low": {"rank": 2, "alpha": 5.0},
    "high": {"rank": 12, "alpha": 15.0, "use_rslora": True},
    "dora": {"rank": 4, "use_dora": True},
    "attention": {"rank": 7, "alpha": 9.0},
}
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}


def greedy(module, prompt):
    """Tokens after a prompt, and the log-probability of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = torch.tensor([prompt])
        text = module.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=COUNT,
            do_sample=False,
            pad_token_id=0,
        )[0].tolist()
        every = log_probabilities(module, [text])[0]
    start = len(prompt) - 1
    own = every[np.arange(start, len(text) - 1), text[start + 1 :]]
    return text[len(prompt) :], own


@pytest.mark.long_table(2)
@pytest.mark.parametrize("family", ATTENTION)
def test_a_mixed_batch_is_that_of_peft_and_of_merged_models(tiny_model, tmp_path, error, family):
    directory, oracle = tiny_model(family, 1, **FAMILIES[family].fields)
    model = formats.load(directory)
    ours = for_decoding(model)
    targets = FAMILIES[family].targets
    bank = lora.bank(ours.params, slots=4, rank=12, modules=targets, use_dora=True)
    engine = Engine(ours, rows=5, max_length=COUNT + 16, bank=bank)
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        if name == "dora" and family == "mixtral":  # PEFT has no DoRA of experts
            fields = {"rank": 4}
        own = ATTENTION[family] if name == "attention" else targets
        adapters, config = export(model, tmp_path / name, fields, own, seed + 1)
        engine.publish(name, adapters, config)
        formats.write_model(
            tmp_path / f"{name}, merged",
            model,
            lora.merge(lora.bind(model.params, adapters, config)),
            directory,
        )
    rng = np.random.default_rng(0)
    prompts = {name: rng.integers(1, 97, 3 + 2 * i).tolist() for i, name in enumerate(ADAPTERS)}
    prompts |= {None: [5, 6, 7]}
    requests = [Request(p, COUNT, adapter=name, log_probs=0) for name, p in prompts.items()]
    found = dict(zip(prompts, engine.answer(requests), strict=True))
    assert len({tuple(answer.tokens) for answer in found.values()}) > 3
    for name, answer in found.items():
        modules = [oracle]
        if name is not None:
            merged = type(oracle).from_pretrained(tmp_path / f"{name}, merged").eval()
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / name)
            modules = [merged, wrapped.eval()]
        for module in modules:
            tokens, own = greedy(module, prompts[name])
            assert answer.tokens == tokens
            assert error(answer.log_probs.own, own) < 1e-4


def test_adapters_that_were_read_from_files(tiny_model, tmp_path):
    """What `formats.read_adapter` gives goes into an engine as it is."""
    directory, _ = tiny_model("llama", 1, **FAMILIES["llama"].fields)
    model = formats.load(directory)
    config = AdapterConfig(rank=4, alpha=3, target_modules="all-linear")
    adapters, _ = export(model, tmp_path / "a", {"rank": 4, "alpha": 3}, "all-linear", 2)
    read = formats.read_adapter(tmp_path / "a", model.params, model)
    answers = []
    for tree in (read, (adapters, config)):
        bank = lora.bank(model.params, slots=2, rank=4)
        engine = Engine(model, rows=1, max_length=32, bank=bank)
        engine.publish("a", *tree)
        answers.append(engine.answer([Request([1, 2, 3], 20, adapter="a")])[0].tokens)
    assert answers[0] == answers[1]
