"""Every kind of trainable leaf on eight virtual devices: one process of its own, read here."""

from pathlib import Path

import pytest

from ..methods import QUICK

CASES = (
    "DoRA, rsLoRA, patterns, bias",
    "PiSSA, LoRA-FA, head",
    "orthogonal, LoRA+, head whole",
    "norm whole, embedding whole, head by LoRA",
    "embedding, DoRA, tied",
    "embedding and head, DoRA, untied",
    "tokens, tied",
    "DoRA, NF4",
    "full, tied",
    "EVA",
    "LoRA-GA, rsLoRA, patterns",
    "VeRA, layers, bias all, norm whole",
    "prompt",
    "prefix",
    "gated prefix, NF4",
)


@pytest.fixture(scope="module")
def result(on_eight_devices):
    return on_eight_devices(Path(__file__).with_name("sharded_methods.py"), flags=QUICK)


def test_every_case_ran(result):
    assert tuple(result) == CASES


@pytest.mark.parametrize("mesh", ["2x2x2", "8x1x1"])
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_compute_what_one_does(result, name, mesh):
    found = result[name][mesh]
    assert max(found["distances"].values()) <= 1e-5, found["distances"]
    assert found["stays"] and found["compiled"] == 1
    assert found["moved"] > 0.01


# On the mesh with all three axes: where the leaves lie that LoRA on linears does not have.
LAID = {
    "prompt": {"prompt_embeddings": "(None, None)"},
    "gated prefix, NF4": {
        "prefix_keys": "(None, None, 'tensor')",
        "prefix_values": "(None, None, 'tensor')",
        "prefix_gate": "(None,)",
    },
    "DoRA, rsLoRA, patterns, bias": {
        "model.layers.self_attn.q_proj.magnitude": "(None, 'tensor')",
        "model.layers.self_attn.q_proj.lora_a": "(None, 'fsdp', None)",
        "model.layers.self_attn.q_proj.lora_b": "(None, None, 'tensor')",
        "model.layers.self_attn.q_proj.full_bias": "(None, 'tensor')",
        "model.layers.self_attn.o_proj.full_bias": "(None, None)",
    },
    "PiSSA, LoRA-FA, head": {
        "lm_head.init_a": "('fsdp', None)",
        "lm_head.init_b": "(None, 'tensor')",
        "model.layers.self_attn.o_proj.init_a": "(None, 'tensor', None)",
        "model.layers.self_attn.o_proj.init_b": "(None, None, 'fsdp')",
    },
    "orthogonal, LoRA+, head whole": {
        "lm_head.full_kernel": "('fsdp', 'tensor')",
        "model.layers.mlp.down_proj.full_kernel": "(None, 'tensor', 'fsdp')",
    },
    "norm whole, embedding whole, head by LoRA": {
        "model.norm.full_scale": "(None,)",
        "model.embed_tokens.full_embedding": "('tensor', 'fsdp')",
        "lm_head.lora_a": "('fsdp', None)",
        "lm_head.lora_b": "(None, 'tensor')",
    },
    "embedding, DoRA, tied": {
        "model.embed_tokens.lora_a": "('tensor', None)",
        "model.embed_tokens.lora_b": "(None, 'fsdp')",
        "model.embed_tokens.magnitude": "('fsdp',)",
    },
    "embedding and head, DoRA, untied": {"lm_head.magnitude": "('tensor',)"},
    "tokens, tied": {"model.embed_tokens.trainable_tokens": "(None, 'fsdp')"},
    "VeRA, layers, bias all, norm whole": {
        "vera_a": "(None, None)",
        "vera_b": "(None, None)",
        "model.layers.self_attn.q_proj.lambda_d": "(None, None)",
        "model.layers.self_attn.q_proj.lambda_b": "(None, 'tensor')",
    },
    "full, tied": {"model.layers.input_layernorm.full_scale": "(None, None)"},
}


@pytest.mark.parametrize("name", LAID)
def test_where_they_lie(result, name):
    specs = result[name]["2x2x2"]["specs"]
    assert {path: specs[path] for path in LAID[name]} == LAID[name]
