"""A mixed batch of a bank against PEFT's `adapter_names` on the exported adapters."""

import warnings

import jax
import numpy as np
import peft
import pytest
import torch

from lora_jax import AdapterConfig, formats, lora

from ..families import FAMILIES
from ..methods import stirred

ADAPTERS = {
    "a": {"rank": 2, "alpha": 5.0},
    "b": {"rank": 6, "alpha": 4.0, "use_rslora": True},
    "c": {"rank": 3, "init": "pissa"},
}
DORA = {"rank": 4, "use_dora": True}  # not with adapter_names in PEFT


def export(model, directory, fields, targets, seed):
    """Adapters that change the model, their config, and their directory for PEFT."""
    config = AdapterConfig(target_modules=targets, **fields)
    base, fresh = lora.init(jax.random.key(seed), model.params, config)
    adapters = stirred(base, fresh, config, seed)
    formats.write_adapter(directory, adapters, model.params, config, base_model="tiny")
    return adapters, config


def log_probabilities(module, tokens, **options):
    with torch.no_grad():
        logits = module(torch.tensor(tokens), use_cache=False, **options).logits
    return torch.log_softmax(logits, dim=-1).numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "mixtral"])
def test_a_mixed_batch_is_that_of_peft(tiny_model, tmp_path, error, family):
    row = FAMILIES[family]
    directory, oracle = tiny_model(family, 0, **row.fields)
    model = formats.load(directory)
    bank = lora.bank(model.params, len(ADAPTERS) + 2, 6, use_dora=True)
    wrapped = None
    for slot, (name, fields) in enumerate((*ADAPTERS.items(), ("dora", DORA)), start=1):
        bank = bank.put(slot, *export(model, tmp_path / name, fields, row.targets, slot))
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(oracle, tmp_path / name, adapter_name=name)
        else:
            wrapped.load_adapter(tmp_path / name, adapter_name=name)
    wrapped = wrapped.eval()
    tokens = np.random.default_rng(0).integers(0, 97, (5, 9))
    bound = bank.bind(model.params, [2, 0, 1, 3, 4])
    found = jax.nn.log_softmax(jax.jit(model.apply)(bound, tokens), axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.set_adapter("dora")
        expected = log_probabilities(wrapped, tokens[4:])
        assert error(found[4:], expected) <= 1e-5
        wrapped.delete_adapter("dora")
        wrapped.set_adapter("a")
        mixed = log_probabilities(wrapped, tokens[:4], adapter_names=["b", "__base__", "a", "c"])
        assert error(found[:4], mixed) <= 1e-5
        assert error(found[:4], log_probabilities(wrapped, tokens[:4])) > 1e-2
