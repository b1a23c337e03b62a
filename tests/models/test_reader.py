"""What the reader of config.json understands: published and old forms, defaults, and every refusal;
sizes of real models by their shapes alone.
"""

import pytest
import transformers

from lora_jax import AdapterConfig, UserError, models
from lora_jax.targets import find_trainable

from ..families import FAMILIES, FULL, SLIDING

LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 7.0], rope_theta=50.0
)


def describe(family, **fields):
    return models.describe({"model_type": family, **FAMILIES[family].size, **fields})


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """A config with little more than sizes, and the same filled up by transformers."""
    absent = ("head_dim", "num_key_value_heads", "max_position_embeddings", "n_positions")
    sizes = {
        name: value
        for name, value in FAMILIES[family].size.items()
        if value is not None and name not in absent
    }
    if family != "gpt2":  # some have 32 heads of keys and values
        sizes |= {"num_attention_heads": 32, "hidden_size": 64}
    filled = getattr(transformers, FAMILIES[family].config_class)(**sizes).to_dict()
    assert len(filled) > 2 * len(sizes)
    expected = models.describe(filled).config
    assert models.describe({"model_type": family, **sizes}).config == expected


# Other ways in which a config is written: (family, fields as transformers 5 writes them, which of
# them go, what stands in their place).
OLD_FORMS = {
    "theta beside a mapping": (
        "qwen3",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
        ["rope_parameters"],
        dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=4.0)),
    ),
    "gemma 3": (
        "gemma3_text",
        dict(
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters={
                FULL: dict(rope_type="linear", rope_theta=500.0, factor=8.0),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
        ["rope_parameters", "layer_types"],
        dict(
            rope_theta=500.0,
            rope_scaling=dict(rope_type="linear", factor=8.0),
            rope_local_base_freq=100.0,
            sliding_window_pattern=2,
            cache_implementation="hybrid",
        ),
    ),
    **{
        f"phi 3, {kind}": (
            "phi3",
            dict(original_max_position_embeddings=32, rope_parameters=LONGROPE),
            ["rope_parameters"],
            dict(
                rope_theta=50.0,
                rope_scaling=dict(
                    type=kind,
                    **{name: LONGROPE[name] for name in ("short_factor", "long_factor")},
                ),
            ),
        )
        for kind in ("su", "yarn", "longrope")
    },
    "phi 3, partial factor": (
        "phi3",
        dict(
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
        ),
        ["rope_parameters"],
        dict(partial_rotary_factor=0.5),
    ),
    "experts": ("qwen3_moe", dict(num_experts=6), ["num_experts"], dict(num_local_experts=6)),
    "windows of qwen": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=7, layer_types=[FULL, SLIDING, SLIDING]),
        ["layer_types"],
        dict(max_window_layers=1),
    ),
}


@pytest.mark.parametrize(("family", "new", "gone", "old"), OLD_FORMS.values(), ids=OLD_FORMS)
def test_old_forms_say_the_same(family, new, gone, old):
    plain = {key: value for key, value in (FAMILIES[family].size | new).items() if key not in gone}
    config_class = getattr(transformers, FAMILIES[family].config_class)
    found = models.describe({"model_type": family, **plain, **old}).config
    assert found == describe(family, **new).config
    if old.get("rope_scaling", {}).get("type") != "su":  # transformers 5 has ceased to read it
        assert found == models.describe(config_class(**plain, **old).to_dict()).config
    assert found != describe(family).config


# Fields of well-known models beside those that transformers writes, all of which leave the numbers
# as they are.
PUBLISHED = {
    "qwen2": dict(use_mrope=False, max_window_layers=3, torch_dtype="bfloat16"),
    "gemma2": dict(cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh"),
    "gemma3_text": dict(attn_logit_softcapping=50.0, _sliding_window_pattern=3),
    "phi3": dict(
        attention_bias=False, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, auto_map={}
    ),
    "gpt2": dict(
        n_ctx=128, n_special=0, output_past=True, predict_special_tokens=True, _num_labels=1,
        summary_first_dropout=0.1, task_specific_params={"text-generation": {"max_length": 50}},
        attn_pdrop=0.1, gradient_checkpointing=True,
    ),
    "mixtral": dict(output_router_logits=False, router_aux_loss_coef=0.02),
    "qwen3_moe": dict(decoder_sparse_step=1, mlp_only_layers=[], max_window_layers=48),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_that_leave_the_numbers_alone(family):
    assert describe(family, **PUBLISHED[family]).config == describe(family).config


def rope(**fields):
    return dict(rope_parameters=dict(rope_theta=10000.0) | fields)


REFUSALS = [
    ("llama", dict(some_new_field=3), "some_new_field=3 is not understood for model_type='llama'"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not supported"),
    ("gpt2", dict(n_head=5), "n_embd=36 is not a multiple of n_head=5"),
    ("gpt2", dict(activation_function="tanhexp"), "activation_function='tanhexp' is not supported"),
    ("qwen2", dict(vocab_size=None), "config.json has no vocab_size"),
    ("qwen2", dict(vocab_size="many"), "vocab_size='many' is not an integer"),
    ("qwen2", dict(vocab_size=True), "vocab_size=True is not an integer"),
    ("qwen2", dict(num_key_value_heads=4), "num_attention_heads=6 is not a multiple of num_key_"),
    ("qwen2", dict(num_hidden_layers=0), "num_hidden_layers=0 is below 1"),
    ("qwen2", dict(max_window_layers=-1), "max_window_layers=-1 is below 0"),
    ("qwen2", dict(attention_dropout=0.1), "attention_dropout=0.1 is not supported, only 0"),
    ("qwen2", dict(tie_word_embeddings=1), "tie_word_embeddings=1 is not true or false"),
    ("qwen3", dict(layer_types=[FULL, SLIDING]), "layer_types=['full_attention', 'sliding_atten"),
    ("qwen3", dict(layer_types=[FULL, FULL, "chunked_attention"]), "must name full_attention or"),
    ("qwen3", dict(layer_types=[FULL, FULL, [SLIDING]]), "must name full_attention or"),
    ("qwen3", dict(layer_types=[FULL, FULL, SLIDING]), "sliding_window is null or not in use"),
    ("gemma2", dict(sliding_window=None), "sliding_window is null or not in use"),
    ("gemma2", dict(sliding_window=0), "sliding_window=0 is below 1"),
    ("gemma2", dict(sliding_window="wide"), "sliding_window='wide' is not an integer or null"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True is not"),
    ("gemma2", dict(attn_logit_softcapping="a"), "attn_logit_softcapping='a' is not a number or"),
    ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True is"),
    ("phi3", dict(resid_pdrop=0.1), "resid_pdrop=0.1 is not supported, only 0"),
    ("phi3", dict(embd_pdrop=0.1), "embd_pdrop=0.1 is not supported, only 0"),
    ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1 is not supported, only 0"),
    ("mixtral", dict(num_experts_per_tok=6), "num_experts_per_tok=6 is above the number of expe"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), "mlp_only_layers=[1] is not supported, only 0"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported, only 1"),
    ("qwen3_moe", dict(num_experts_per_tok=11), "num_experts_per_tok=11 is above the number of ex"),
    ("llama", dict(rope_scaling=3), "rope_scaling=3 is not a mapping"),
    ("llama", rope(rope_type="ntk"), "rope_type='ntk' is not supported; these are: default, lin"),
    ("phi3", rope(rope_type="linear", factor=2.0), "rope_type='linear' is not supported; these"),
    ("llama", rope(rope_type="linear"), "rope_type='linear' needs factor"),
    ("llama", rope(rope_type="llama3", factor=2.0), "needs low_freq_factor, high_freq_factor"),
    ("llama", rope(rope_type="linear", factor="4"), "factor='4' is not a number"),
    ("llama", rope(rope_type="linear", factor=True), "factor=True is not a number"),
    ("llama", rope(rope_type="linear", factor=0), "factor=0 is not above 0"),
    ("llama", rope(rope_type="linear", factor=2.0, beta_fast=3), "not understood for rope_type="),
    ("llama", rope(rope_type="yarn", factor=2.0, truncate=3), "truncate=3 is not true or false"),
    ("llama", dict(rope_theta="large"), "rope_theta='large' is not a number"),
    ("llama", dict(rope_theta=-1.0), "rope_theta=-1.0 is not above 0"),
    ("phi3", rope(partial_rotary_factor=1.5), "partial_rotary_factor=1.5 is above 1"),
    ("phi3", rope(partial_rotary_factor="half"), "partial_rotary_factor='half' is not a number"),
    ("phi3", rope(**LONGROPE | dict(long_factor=[1.0, 2.0])), "long_factor has 2 numbers, and 3"),
    ("phi3", rope(**LONGROPE | dict(short_factor=2.0)), "short_factor=2.0 is not a list of"),
    ("phi3", rope(**LONGROPE | dict(short_factor=[1.0, "a", 2.0])), "short_factor=[1.0, 'a', 2.0]"),
    ("phi3", rope(**LONGROPE | dict(long_factor=[1.0, 0.0, 2.0])), "long_factor=[1.0, 0.0, 2.0]"),
    ("phi3", rope(**LONGROPE, partial_rotary_factor=0.7), "and 2 pairs of features turn in a head"),
    ("gemma3_text", dict(rope_parameters={FULL: {}, "factor": 2}), "mix layer types and ['fac"),
    ("gemma3_text", dict(rope_parameters={FULL: 3}), "rope of full_attention=3 is not a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "text"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_named(family, fields, text):
    with pytest.raises(UserError) as caught:
        describe(family, **fields)
    assert text in str(caught.value)


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(UserError, match="model_type='mamba' is not supported; these are: ") as told:
        models.describe({"model_type": "mamba"})
    assert all(name in str(told.value) for name in FAMILIES)
    with pytest.raises(UserError, match="model_type=None is not supported"):
        models.describe({})


def test_all_problems_are_told_at_once_and_fields_can_be_ignored():
    fields = dict(vocab_size="many", logit_scale=2.0, rope_parameters=dict(rope_type="ntk"))
    with pytest.raises(UserError) as caught:
        describe("olmo2", **fields)
    assert all(name in str(caught.value) for name in ("vocab_size", "logit_scale", "rope_type"))
    with pytest.raises(UserError, match=r"set ignore_config_fields=\[logit_scale\]"):
        describe("olmo2", logit_scale=2.0)
    config = {"model_type": "olmo2", **FAMILIES["olmo2"].size, "logit_scale": 2.0}
    assert models.describe(config, {"logit_scale"}).config == describe("olmo2").config


def gpt2(width, layers, heads):
    return dict(model_type="gpt2", n_embd=width, n_layer=layers, n_head=heads)


def llama_like(family, hidden, layers, heads, kv_heads, mlp, **more):
    return dict(
        model_type=family,
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        **more,
    )


QWEN25_HALF_B = llama_like("qwen2", 896, 24, 14, 2, 4864, tie_word_embeddings=True)
QWEN3_8B = llama_like("qwen3", 4096, 36, 32, 8, 12288, head_dim=128)
GPT3 = gpt2(12288, 96, 96)  # 175 billion parameters
COUNTS = [  # (config, targets, rank, trainable parameters)
    (gpt2(768, 12, 12), ["c_attn"], 8, 294_912),
    (gpt2(768, 12, 12), "all-linear", 8, 1_179_648),
    (gpt2(1024, 24, 16), ["c_attn"], 4, 393_216),
    (gpt2(1280, 36, 20), ["c_attn"], 4, 737_280),
    (QWEN25_HALF_B, "all-linear", 16, 8_798_208),
    (QWEN3_8B, "all-linear", 1, 2_727_936),
    (GPT3, ["c_attn.q", "c_attn.v"], 1, 4_718_592),
    (GPT3, ["c_attn.q", "c_attn.v"], 4, 18_874_368),
    (GPT3, ["c_attn.q", "c_attn.v"], 8, 37_748_736),
    (llama_like("llama", 12288, 96, 96, 96, 49152), ["q_proj", "v_proj"], 4, 18_874_368),
]


@pytest.mark.parametrize(("config", "targets", "rank", "count"), COUNTS, ids=str)
def test_trainable_parameters_of_real_models(config, targets, rank, count):
    params = models.describe(config).params
    found = find_trainable(params, AdapterConfig(rank=rank, target_modules=targets))
    assert found.parameters == count
