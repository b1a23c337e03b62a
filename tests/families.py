"""The table of model families that every test of families goes through, and tiny models of them.

A new family is one more row of `FAMILIES`.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import models, tree
from lora_jax.models.common import Model

# Of SmolLM2-135M, from its config.json.
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"
# No two axes are equal: vocabulary, hidden, intermediate, queries (6 x 6 or 6 x 8), keys (2 x 6 or
# 2 x 8), layers.
IMPLIED = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
GIVEN = IMPLIED | dict(head_dim=8)
# Layers of a delta rule: queries and keys 2 x 11, values 4 x 7. Each layer divides its keys and its
# output by their lengths, which multiplies rounding where they are short: by less with more
# features of a key, and with a large epsilon.
DELTA = GIVEN | dict(num_hidden_layers=5, linear_key_head_dim=11, linear_value_head_dim=7)
DELTA |= dict(linear_num_key_heads=2, linear_num_value_heads=4, rms_norm_eps=0.05)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=7)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value, **more}


# Of queries that are scaled from the seventh token on.
SCALED = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, llama_4_scaling_beta=0.5)
SCALED |= dict(original_max_position_embeddings=6, mscale=1.0, mscale_all_dim=1.0)


@dataclass(frozen=True)
class Family:
    """What a family is called in transformers, fields that give the size of a tiny model, and
    fields that turn each of its switches on and off; tests of one model take the first variant.
    """

    config_class: str
    model_class: str
    size: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    targets: str | list[str] = "all-linear"  # that both PEFT and we adapt

    @property
    def fields(self) -> dict[str, Any]:
        return self.size | next(iter(self.variants.values()))


FAMILIES = {
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        GIVEN,
        {"biases": dict(attention_bias=True, mlp_bias=True)},
    ),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", GIVEN, {"window": dict(sliding_window=5)}
    ),
    "qwen2": Family(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        IMPLIED,
        {
            "window from a layer on, tied": dict(
                **QWEN_WINDOW, max_window_layers=1, tie_word_embeddings=True, rms_norm_eps=0.05
            ),
            "layer types": dict(
                **QWEN_WINDOW,
                layer_types=[SLIDING, FULL, SLIDING],
                head_dim=10,
                hidden_act="gelu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "qwen3": Family(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        GIVEN,
        {
            "window from a layer on, biases": dict(
                **QWEN_WINDOW, max_window_layers=1, attention_bias=True, rms_norm_eps=0.05
            ),
            "layer types, tied": dict(
                **QWEN_WINDOW,
                layer_types=[SLIDING, FULL, SLIDING],
                tie_word_embeddings=True,
                hidden_act="relu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GIVEN,
        {
            "caps that bite, biases": dict(
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                sliding_window=9,
                query_pre_attn_scalar=24,
                attention_bias=True,
                rms_norm_eps=0.05,
            ),
            "no caps, layer types, untied": dict(
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                sliding_window=5,
                layer_types=[FULL, SLIDING, SLIDING],
                query_pre_attn_scalar=2,
                tie_word_embeddings=False,
                hidden_activation="silu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GIVEN,
        {
            "two rotations, biases": dict(
                sliding_window=9,
                layer_types=[SLIDING, FULL, SLIDING],
                query_pre_attn_scalar=24,
                attention_bias=True,
                rope_parameters={
                    FULL: dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                    SLIDING: theta(100.0),
                },
            ),
            "cap, untied": dict(
                final_logit_softcapping=3.0,
                sliding_window=5,
                tie_word_embeddings=False,
                hidden_activation="silu",
                rms_norm_eps=0.05,
            ),
            "plain": {},
        },
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        GIVEN
        | dict(
            num_hidden_layers=6,
            sliding_window=9,
            global_head_dim=12,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=97,
        ),
        {
            "keys as values, biases": dict(
                layer_types=[SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
                attention_k_eq_v=True,
                num_global_key_value_heads=1,
                attention_bias=True,
                final_logit_softcapping=3.0,
                rms_norm_eps=0.05,
            ),
            # Norms multiply rounding where their input is short: by less with a large epsilon.
            "shared keys, inputs of layers": dict(
                rms_norm_eps=0.3,
                layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
                num_kv_shared_layers=3,
                use_double_wide_mlp=True,
                hidden_size_per_layer_input=5,
                vocab_size_per_layer_input=99,
                rope_parameters={
                    FULL: dict(
                        rope_type="proportional",
                        rope_theta=500.0,
                        partial_rotary_factor=0.6,
                        factor=2.0,
                    ),
                    SLIDING: theta(100.0),
                },
            ),
            "untied, heads alike": dict(
                rms_norm_eps=0.3,
                global_head_dim=8,
                tie_word_embeddings=False,
                hidden_activation="silu",
                sliding_window=5,
            ),
        },
    ),
    "gemma": Family(
        "GemmaConfig",
        "GemmaForCausalLM",
        GIVEN,
        {
            "biases, untied": dict(
                attention_bias=True,
                tie_word_embeddings=False,
                hidden_act="silu",
                rms_norm_eps=0.05,
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        IMPLIED,
        {
            "factors, biases": dict(
                embedding_multiplier=3.0,
                attention_multiplier=0.3,
                residual_multiplier=0.4,
                logits_scaling=0.5,
                attention_bias=True,
                mlp_bias=True,
                rms_norm_eps=0.05,
            ),
            "tied": dict(
                tie_word_embeddings=True,
                residual_multiplier=1.5,
                head_dim=10,
                hidden_act="gelu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "phi3": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        IMPLIED,
        {
            "window, part rotated": dict(
                sliding_window=9,
                rope_parameters=theta(300.0, partial_rotary_factor=0.7),
                rms_norm_eps=0.05,
            ),
            "odd part rotated, tied": dict(  # 9 of 10 features: the last pair too
                rope_parameters=theta(10000.0, partial_rotary_factor=0.9),
                head_dim=10,
                hidden_act="gelu",
                tie_word_embeddings=True,
            ),
            "plain": {},
        },
    ),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=97, n_embd=36, n_layer=3, n_head=6, n_positions=128)
        | dict(bos_token_id=None, eos_token_id=None),
        {
            "scores by layer": dict(
                scale_attn_by_inverse_layer_idx=True,
                n_inner=50,
                layer_norm_epsilon=0.05,
                activation_function="relu",
            ),
            "plain scores, untied": dict(
                scale_attn_weights=False, tie_word_embeddings=False, activation_function="silu"
            ),
            "plain": {},
        },
    ),
    "olmo2": Family(
        "Olmo2Config",
        "Olmo2ForCausalLM",
        IMPLIED,
        {
            "biases, tied": dict(
                attention_bias=True,
                tie_word_embeddings=True,
                head_dim=10,
                hidden_act="gelu",
                rms_norm_eps=0.05,
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "arcee": Family(
        "ArceeConfig",
        "ArceeForCausalLM",
        IMPLIED,
        {
            "biases": dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.05),
            "tied": dict(
                tie_word_embeddings=True,
                head_dim=10,
                hidden_act="gelu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
    ),
    "starcoder2": Family(
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        IMPLIED,
        {
            "window, untied": dict(sliding_window=5, tie_word_embeddings=False, norm_epsilon=0.05),
            "no biases": dict(use_bias=False, hidden_act="gelu", rope_parameters=theta(300.0)),
            "plain": {},
        },
    ),
    "nemotron": Family(
        "NemotronConfig",
        "NemotronForCausalLM",
        GIVEN,
        {
            "biases, rotated in full": dict(
                attention_bias=True,
                mlp_bias=True,
                norm_eps=0.05,
                rope_parameters=theta(300.0, partial_rotary_factor=1.0),
            ),
            "tied": dict(
                tie_word_embeddings=True,
                hidden_act="gelu",
                rope_parameters=theta(10000.0, partial_rotary_factor=0.25),
            ),
            "plain": {},
        },
    ),
    "phi": Family(
        "PhiConfig",
        "PhiForCausalLM",
        IMPLIED | dict(hidden_size=48),
        {
            "norms of heads": dict(
                qk_layernorm=True,
                layer_norm_eps=0.05,
                rope_parameters=theta(300.0, partial_rotary_factor=0.25),
            ),
            "rotated in full": dict(
                hidden_act="gelu",
                rope_parameters=theta(10000.0, partial_rotary_factor=1.0),
            ),
            "plain": {},
        },
    ),
    "cohere": Family(
        "CohereConfig",
        "CohereForCausalLM",
        IMPLIED,
        {
            "norms of heads, biases": dict(
                use_qk_norm=True, attention_bias=True, layer_norm_eps=0.05, logit_scale=0.5
            ),
            "untied": dict(
                tie_word_embeddings=False,
                logit_scale=1.5,
                hidden_act="gelu",
                rope_parameters=theta(300.0),
            ),
            "plain": dict(logit_scale=1.0),
        },
    ),
    "glm4": Family(
        "Glm4Config",
        "Glm4ForCausalLM",
        GIVEN,
        {
            "tied, rotated in full": dict(
                tie_word_embeddings=True,
                rms_norm_eps=0.05,
                rope_parameters=theta(300.0, partial_rotary_factor=1.0),
            ),
            "no biases": dict(
                attention_bias=False,
                hidden_act="gelu",
                rope_parameters=theta(10000.0, partial_rotary_factor=0.25),
            ),
            "plain": {},
        },
    ),
    "exaone4": Family(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        IMPLIED,
        {
            "window, tied": dict(
                sliding_window=5, sliding_window_pattern=2, tie_word_embeddings=True
            ),
            "layer types": dict(
                sliding_window=9,
                layer_types=[SLIDING, FULL, SLIDING],
                hidden_act="gelu",
                rms_norm_eps=0.05,
                rope_parameters=theta(300.0),
            ),
            "no window": dict(
                sliding_window=None,
                layer_types=[FULL] * 3,
                head_dim=10,
                rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
            ),
        },
    ),
    "ministral3": Family(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        GIVEN,
        {
            "window": dict(sliding_window=9, rope_parameters=SCALED, rms_norm_eps=0.05),
            "tied": dict(
                tie_word_embeddings=True,
                hidden_act="gelu",
                rope_parameters=SCALED
                | dict(mscale=0.7, beta_fast=4.0, beta_slow=2.0, llama_4_scaling_beta=0.2),
            ),
        },
    ),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        GIVEN | dict(num_local_experts=5),
        {
            "window, three experts": dict(
                sliding_window=9,
                num_experts_per_tok=3,
                hidden_act="gelu",
                rms_norm_eps=0.05,
                rope_parameters=theta(300.0),
            ),
            "tied": dict(tie_word_embeddings=True),
            "plain": {},
        },
        targets=ATTENTION,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        GIVEN | dict(num_experts=10, moe_intermediate_size=24, num_experts_per_tok=3),
        {
            "window, shares of one, biases": dict(
                **QWEN_WINDOW, norm_topk_prob=True, attention_bias=True, rms_norm_eps=0.05
            ),
            "two experts, tied": dict(
                num_experts_per_tok=2,
                tie_word_embeddings=True,
                hidden_act="gelu",
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
        targets=ATTENTION,
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        GIVEN | dict(num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=256),
        {
            "window, limit that bites": dict(
                sliding_window=5,
                swiglu_limit=0.5,
                swiglu_alpha=0.9,
                rms_norm_eps=0.05,
                rope_parameters=dict(
                    rope_type="yarn",
                    rope_theta=300.0,
                    factor=4.0,
                    beta_fast=8.0,
                    beta_slow=1.0,
                    truncate=False,
                    original_max_position_embeddings=32,
                ),
            ),
            "no biases, layer types, tied": dict(
                attention_bias=False,
                sliding_window=9,
                layer_types=[FULL, SLIDING, SLIDING],
                num_experts_per_tok=3,
                tie_word_embeddings=True,
                rope_parameters=theta(300.0),
            ),
            "plain": {},
        },
        targets=ATTENTION,
    ),
    "lfm2": Family(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        IMPLIED | dict(num_hidden_layers=5, block_multiple_of=8),
        {
            "convolutions, biases, untied": dict(
                layer_types=["conv", FULL, "conv", "conv", FULL],
                conv_bias=True,
                conv_L_cache=4,
                norm_eps=0.05,
                tie_word_embeddings=False,
            ),
            "attention by index, width scaled": dict(
                full_attn_idxs=[1, 3],
                block_ffn_dim_multiplier=1.3,
                block_multiple_of=5,
                rope_parameters=theta(300.0),
            ),
            "attention alone, width as it is": dict(block_auto_adjust_ff_dim=False),
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DELTA
        | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
        | dict(shared_expert_intermediate_size=13),
        {
            "biases, a layer without experts": dict(
                layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL],
                attention_bias=True,
                mlp_only_layers=[0],
                linear_conv_kernel_dim=3,
                rms_norm_eps=0.05,
                tie_word_embeddings=True,
            ),
            "experts in every other layer": dict(
                layer_types=[LINEAR, LINEAR, FULL, LINEAR, LINEAR],
                decoder_sparse_step=2,
                norm_topk_prob=False,
                hidden_act="gelu",
                rope_parameters=theta(300.0, partial_rotary_factor=0.5),
            ),
            "plain": {},
        },
        # PEFT takes the names of other linears for those of experts.
        targets=[*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"],
    ),
    "qwen3_5_text": Family(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        DELTA,
        {
            "biases, layer types, tied": dict(
                layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL],
                attention_bias=True,
                linear_conv_kernel_dim=3,
                rms_norm_eps=0.05,
                tie_word_embeddings=True,
            ),
            "every other layer, sections": dict(
                full_attention_interval=2,
                hidden_act="gelu",
                rope_parameters=theta(
                    300.0,
                    partial_rotary_factor=0.5,
                    mrope_section=[1, 1, 0],
                    mrope_interleaved=True,
                ),
            ),
            "plain": {},
        },
    ),
}
# Families with layers that keep a state in place of keys and values.
STATEFUL = ("lfm2", "qwen3_next", "qwen3_5_text")

# Families whose modules are those of another one here, with a class of their own in transformers.
ALIASES = {
    "ministral": Family(
        "MinistralConfig",
        "MinistralForCausalLM",
        GIVEN,
        {
            "layer types": dict(
                rms_norm_eps=0.05, sliding_window=5, layer_types=[FULL, SLIDING, SLIDING]
            ),
            "window": dict(sliding_window=5, tie_word_embeddings=True, rms_norm_eps=0.05),
        },
    ),
    "olmo3": Family(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        IMPLIED,
        {
            "window, biases, two rotations": dict(
                sliding_window=5,
                attention_bias=True,
                rms_norm_eps=0.05,
                rope_parameters={
                    FULL: dict(rope_type="linear", rope_theta=500.0, factor=4.0),
                    SLIDING: theta(100.0),
                },
            ),
            "layer types, tied": dict(
                sliding_window=9,
                layer_types=[FULL, SLIDING, FULL],
                tie_word_embeddings=True,
                hidden_act="gelu",
            ),
        },
    ),
    "seed_oss": Family(
        "SeedOssConfig",
        "SeedOssForCausalLM",
        GIVEN,
        {
            "plain": {},
            "other biases": dict(attention_bias=False, attention_out_bias=True, mlp_bias=True),
            "no biases, tied": dict(
                attention_bias=False, tie_word_embeddings=True, rope_parameters=theta(300.0)
            ),
        },
    ),
    "smollm3": Family(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        IMPLIED,
        {
            "window without rotation, biases, untied": dict(
                use_sliding_window=True,
                sliding_window=5,
                no_rope_layers=[1, 0, 1],
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=False,
            ),
            "layer types": dict(
                use_sliding_window=True,
                sliding_window=9,
                layer_types=[SLIDING, FULL, SLIDING],
                no_rope_layer_interval=2,
                hidden_act="gelu",
                rms_norm_eps=0.05,
            ),
            "plain": dict(
                head_dim=10,
                rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
            ),
        },
    ),
}


def in_turns(families: Iterable[str], forms: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a family and a form of its weights: a family without experts and one with them in
    all forms, the others in one each, by turns.
    """
    own = list(forms)
    return [
        (family, form)
        for number, family in enumerate(families)
        for index, form in enumerate(own)
        if family in ("llama", "mixtral") or number % len(own) == index
    ]


def adds_one(family: str, path: str | tree.Path) -> bool:
    """Return True if the norm at a path multiplies by 1 + scale."""
    adds = "gemma" in family or family in ("nemotron", "qwen3_next", "qwen3_5_text", "qwen3_5")
    return adds and not family.startswith("gemma4") and "linear_attn" not in path


def torch_model(family: str, seed: int, fields: dict[str, Any]) -> Any:
    """A model of transformers with every parameter random: norms and biases too."""
    import torch
    import transformers

    torch.set_num_threads(1)  # products so small are done before a second thread has woken
    row = (FAMILIES | ALIASES)[family]
    config = getattr(transformers, row.config_class)(**copy.deepcopy(fields))
    if family == "gemma2":
        config._attn_implementation = "eager"  # the only one that bends scores
    model = getattr(transformers, row.model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread(noise, name, adds_one(family, name)))
        fill_scalars(model, generator)
    return model


def scalars(model: Any) -> dict[str, Any]:
    """Return the factors of layers, which transformers has as buffers."""
    return {name: x for name, x in model.named_buffers() if name.endswith("layer_scalar")}


def fill_scalars(model: Any, generator: Any) -> None:
    """Fill the factors of layers with random numbers."""
    import torch

    for buffer in scalars(model).values():
        buffer.copy_(1 + 0.3 * torch.randn(buffer.shape, generator=generator))


def spread(noise: Any, name: str, around_zero: bool) -> Any:
    """Noise as large as the weight of that name is: norms vary about one, or about zero where they
    multiply by 1 + weight, and a product with a kernel keeps the size of its input.
    """
    if name.endswith("A_log"):  # in transformers, decays that add up to much cost digits
        return 0.3 * noise - 3
    if noise.ndim == 1:
        is_norm = name.endswith("weight") and not around_zero
        return 0.3 * noise + is_norm
    if "embed" in name or ".wte." in name or ".wpe." in name:
        return 0.3 * noise
    conv1d = tree.is_conv1d(tuple(name.split("."))[:-1] or ("",))
    return noise * noise.shape[0 if conv1d else -1] ** -0.5


def save(model: Any, directory: Path, dtype: str = "float32", max_shard_size: str = "1GB") -> None:
    """Write the files of a torch model, and round its own weights to what is in them."""
    import torch

    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    stored.save_pretrained(directory, max_shard_size=max_shard_size)
    with torch.no_grad():  # not model.to: that would round the rotary frequencies too
        for parameter, rounded in zip(model.parameters(), stored.parameters(), strict=True):
            parameter.copy_(rounded)


def describe(family: str, **fields: Any) -> Model:
    """The model of a config.json of the family, with shapes in place of weights."""
    return models.describe({"model_type": family, **fields})


def random_model(family: str, seed: int = 0, **fields: Any) -> Model:
    """The same with random weights, by no help of torch."""
    model, rng = describe(family, **fields), np.random.default_rng(seed)

    def draw(path: tree.Path, leaf: Any) -> Any:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1] in ("scale", "bias", "layer_scalar"):
            one = path[-1] != "bias" and not adds_one(family, path)
            return jnp.asarray(0.3 * noise + one)
        size = 0.3 if path[-1] == "embedding" else leaf.shape[-2] ** -0.5
        return jnp.asarray(size * noise)

    leaves = tree.flatten(model.params)
    params = tree.unflatten({path: draw(path, leaf) for path, leaf in leaves.items()})
    return model.replace(params=params)
