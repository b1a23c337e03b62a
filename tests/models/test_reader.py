"""Fields that the reader of config.json understands: published and old forms, defaults, and every
refusal; sizes of real models by their shapes alone.
"""

import pytest
import transformers

from lora_jax import AdapterConfig, UserError, models
from lora_jax.targets import find_trainable

from ..encoders import ENCODERS
from ..families import ALIASES, FAMILIES, FULL, SLIDING
from ..towers import TOWERS

LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 7.0], rope_theta=50.0
)


ALL = FAMILIES | ALIASES
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads",)
SIZES_OF_GPT2 = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
SIZES_OF_DISTILBERT = ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads")


def describe(family, **fields):
    size = ALL[family].size if family in ALL else ENCODERS[family].fields
    return models.describe({"model_type": family, **size, **fields})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_config_with_nothing_in_it_is_that_of_transformers(family):
    """Every default of the config class; those of the sizes are noted."""
    filled = transformers.AutoConfig.for_model(family).to_dict()
    found, expected = models.describe({"model_type": family}), models.describe(filled)
    assert found.config == expected.config
    names = {"gpt2": SIZES_OF_GPT2, "distilbert": SIZES_OF_DISTILBERT}.get(family, SIZES)
    if family == "mistral3":  # its class has sizes of its own for the text
        names = ()
    start = "text_config." if family in TOWERS and family != "qwen2_5_vl" else ""
    notes = {f"config.json has no {start}{name}" for name in names}
    notes |= {f"model_type={family!r} reads images"} if family in TOWERS else set()
    assert {note.partition(":")[0] for note in found.notes} == notes
    assert not any("config.json has no" in note for note in expected.notes)


@pytest.mark.parametrize("family", ALL)
def test_defaults_are_those_of_transformers(family):
    """A config with little more than sizes, and the same filled up by transformers."""
    absent = ("head_dim", "num_key_value_heads", "max_position_embeddings", "n_positions")
    sizes = {
        name: value
        for name, value in ALL[family].size.items()
        if value is not None and name not in absent
    }
    if family != "gpt2":  # some have 32 heads of keys and values
        sizes |= {"num_attention_heads": 32, "hidden_size": 64}
    filled = getattr(transformers, ALL[family].config_class)(**sizes).to_dict()
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
    "gpt2, names of other families": (
        "gpt2",
        dict(n_embd=24, n_head=4, n_layer=2, n_positions=64),
        ["n_embd", "n_head", "n_layer", "n_positions"],
        dict(
            hidden_size=24, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64
        ),
    ),
    "mixtral, experts": (
        "mixtral", dict(num_local_experts=6), ["num_local_experts"], dict(num_experts=6)
    ),
    "head_dim is null": ("mixtral", dict(head_dim=6), ["head_dim"], dict(head_dim=None)),
}  # fmt: skip


@pytest.mark.parametrize(("family", "new", "gone", "old"), OLD_FORMS.values(), ids=OLD_FORMS)
def test_old_forms_say_the_same(family, new, gone, old):
    plain = {key: value for key, value in (FAMILIES[family].size | new).items() if key not in gone}
    config_class = getattr(transformers, FAMILIES[family].config_class)
    found = models.describe({"model_type": family, **plain, **old}).config
    assert found == describe(family, **new).config
    if old.get("rope_scaling", {}).get("type") != "su":  # transformers 5 has ceased to read it
        assert found == models.describe(config_class(**plain, **old).to_dict()).config
    assert found != describe(family).config


# Fields of well-known models next to those that transformers writes, all of which leave the numbers
# as they are.
DECODER = dict(
    is_causal=True, use_cache=False, auto_map={"AutoModel": "a.B"}, _flash_attn_2_enabled=True,
    unsloth_fixed=True, unsloth_version="2025.1", torch_dtype="float16", pretraining_tp=2,
    quantization_config=None, sliding_window_pattern=None, rope_interleaved=False,
    num_nextn_predict_layers=0, tie_encoder_decoder=False, classifier_dropout=None, some_flag=False,
    max_sequence_length=2048, do_sample=True, temperature=0.6, bos_token_id=1, eos_token_id=[1, 2],
    partial_rotary_factor=1.0, pruned_heads={}, per_layer_config=None, rope_scaling=None,
)  # fmt: skip
PUBLISHED = {
    "llama": DECODER | dict(is_llama_config=True, head_dim=8, layer_types=[FULL] * 3),
    "mistral": dict(layer_types=[SLIDING] * 3, head_dim=8),
    "olmo2": dict(clip_qkv=None, layer_types=[FULL] * 3),
    "seed_oss": dict(rope_scaling={"rope_type": "default"}, pretraining_tp=1),
    "qwen2": DECODER | dict(
        use_mrope=False, max_window_layers=3, torch_dtype="bfloat16", sliding_window=0,
        dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192},
    ),
    "qwen3": dict(use_qk_norm=True, sliding_window=None),
    "gemma": dict(hidden_activation=None, use_bidirectional_attention=None),
    "granite": DECODER | dict(head_dim=6, layer_types=[FULL] * 3),
    "olmo3": dict(rope_scaling=None, clip_qkv=None, head_dim=6),
    "smollm3": DECODER | dict(head_dim=6, use_sliding_window=False, max_window_layers=28),
    "arcee": DECODER | dict(head_dim=6),
    "starcoder2": dict(
        activation_function="gelu", attention_softmax_in_fp32=True, layer_norm_epsilon=1e-05,
        mlp_type="default", norm_type="layer_norm", scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
    ),
    "nemotron": dict(rope_scaling=None, partial_rotary_factor=0.5),
    "phi": dict(rope_scaling=None, partial_rotary_factor=0.5, num_key_value_heads=2),
    "cohere": dict(model_max_length=8192, pretraining_tp=1, use_qk_norm=False),
    "glm4": dict(partial_rotary_factor=0.5, rope_scaling=None),
    "exaone4": dict(layer_types=[SLIDING] * 3, sliding_window_pattern="LLLG"),
    "gemma2": dict(
        cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh", sliding_window_size=4096
    ),
    "gemma3_text": dict(attn_logit_softcapping=50.0, _sliding_window_pattern=3),
    "phi3": dict(
        attention_bias=False, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, auto_map={}
    ),
    "gpt2": dict(
        n_ctx=128, n_special=0, output_past=True, predict_special_tokens=True, _num_labels=1,
        task_specific_params={"text-generation": {"max_length": 50}},
        gradient_checkpointing=True, summary_first_dropout=0.1,
    ),
    "mixtral": dict(output_router_logits=False, router_aux_loss_coef=0.02, head_dim=8),
    "gpt_oss": dict(
        experts_per_token=4, initial_context_length=4096, output_router_logits=False,
        router_aux_loss_coef=0.9, quantization_config=None,
    ),
    "qwen3_moe": dict(
        decoder_sparse_step=1, mlp_only_layers=[], max_window_layers=48, use_qk_norm=True,
        qkv_bias=False, shared_expert_intermediate_size=0, layer_types=[FULL] * 3,
    ),
    "qwen3_next": dict(
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, output_router_logits=False,
        router_aux_loss_coef=0.001, full_attention_interval=4, partial_rotary_factor=0.25,
        rope_scaling=None, use_sliding_window=False,
    ),
    "qwen3_5_text": dict(
        attn_output_gate=True, output_gate_type="swish", mamba_ssm_dtype="float32",
        mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, mlp_only_layers=[],
        partial_rotary_factor=0.25, full_attention_interval=4,
    ),
    "bert": dict(
        directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12,
        pooler_num_fc_layers=3, pooler_size_per_head=128, pooler_type="first_token_transform",
        position_embedding_type="absolute", is_causal=False, chunk_size_feed_forward=4,
    ),
    "distilbert": dict(
        sinusoidal_pos_embds=True, tie_weights_=True, qa_dropout=0.1, output_past=True,
        finetuning_task="sst-2", hidden_size=36, num_attention_heads=6, num_hidden_layers=3,
    ),
    "electra": dict(
        summary_type="last", summary_use_proj=False, summary_activation="tanh",
        summary_last_dropout=0.1, position_embedding_type="absolute",
    ),
    "modernbert": dict(
        global_rope_theta=160000.0, local_rope_theta=10000.0, global_attn_every_n_layers=3,
        layer_norm_eps=1e-12, reference_compile=True, position_embedding_type="absolute",
        decoder_bias=False, sparse_prediction=True, deterministic_flash_attn=True,
        initializer_cutoff_factor=3.0, sparse_pred_ignore_index=-1,
    ),
    "ministral3": dict(rope_parameters=dict(
        type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16384,
        beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
        max_position_embeddings=262144,
    )),
    "roberta": dict(finetuning_task="mrpc", problem_type="single_label_classification"),
    "xlm-roberta": dict(language="english", name="XLMRoberta", output_past=True),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_that_leave_the_numbers_alone(family):
    found = describe(family, **PUBLISHED[family])
    assert found.config == describe(family).config
    assert not found.notes


# Fields that are read in another way than written: (family, fields, the note).
NOTES = [
    ("llama", dict(attention_dropout=0.1), "noise in training, which is left out: attention_dropo"),
    ("seed_oss", dict(residual_dropout=0.1), "left out: residual_dropout=0.1; dropout of adapters"),
    ("phi3", dict(resid_pdrop=0.1, embd_pdrop=0.2), "resid_pdrop=0.1, embd_pdrop=0.2; dropout of"),
    ("gpt2", dict(attn_pdrop=0.1), "left out: attn_pdrop=0.1; dropout of adapters is adapter.drop"),
    ("bert", dict(hidden_dropout_prob=0.1), "left out: hidden_dropout_prob=0.1; dropout of adapt"),
    ("distilbert", dict(seq_classif_dropout=0.2), "left out: seq_classif_dropout=0.2; dropout of"),
    ("mixtral", dict(router_jitter_noise=0.1), "left out: router_jitter_noise=0.1; dropout of ad"),
    ("mixtral", dict(output_router_logits=True), "here train.router_aux_loss_coef does"),
    (
        "gpt_oss",
        dict(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []}),
        "quant_method='mxfp4': the experts are read as bfloat16, which is exact and takes almost",
    ),
    (
        "llama",
        dict(quantization_config={"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}),
        "quant_method='bitsandbytes': weights are stored in int8; they are dequantised as they",
    ),
    (
        "llama",
        dict(
            quantization_config=dict(
                quant_method="fp8",
                activation_scheme="static",
                modules_to_not_convert=["lm_head"],
                weight_block_size=None,
                dequantize=False,
                other=None,
            )
        ),
        "quant_method='fp8': weights are stored in FP8; they are dequantised as they are read, to",
    ),
    ("llama", dict(layer_types=[FULL, SLIDING, FULL]), "the layers have full_attention"),
    ("mistral", dict(layer_types=[FULL, SLIDING, FULL]), "the layers have sliding_attention"),
]


@pytest.mark.parametrize(("family", "fields", "text"), NOTES, ids=lambda value: str(value)[:40])
def test_what_is_read_in_another_way_is_noted(family, fields, text):
    found = describe(family, **fields)
    assert found.config == describe(family).config
    assert len(found.notes) == 1 and text in found.notes[0]


def rope(**fields):
    return dict(rope_parameters=dict(rope_theta=10000.0) | fields)


def quantized(method, **fields):
    return dict(quantization_config=dict(quant_method=method) | fields)


REFUSALS = [
    ("llama", dict(some_new_field=3), "some_new_field=3 is not understood for model_type='llama'"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not supported"),
    ("gpt2", dict(hidden_size=24), "hidden_size=24 and n_embd=36 are two values of one field"),
    ("gpt2", dict(scale_attn_weights=None), "scale_attn_weights=None is not true or false; absen"),
    ("gpt2", dict(n_head=5), "n_embd=36 is not a multiple of n_head=5"),
    ("gpt2", dict(activation_function="tanhexp"), "activation_function='tanhexp' is not supported"),
    ("qwen2", dict(vocab_size=None), "vocab_size=None is not an integer; absent means 151936"),
    ("qwen2", dict(hidden_act=None), "hidden_act=None is not a string; absent means 'silu'"),
    ("qwen2", dict(rms_norm_eps=None), "rms_norm_eps=None is not a number; absent means 1e-06"),
    ("qwen2", dict(use_sliding_window=None), "use_sliding_window=None is not true or false"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=0), "sliding_window=0 is below 1"),
    ("qwen2", dict(is_causal=False), "is_causal=False is not supported, only True (transformers"),
    ("qwen3", dict(is_causal=None), "is_causal=None is not supported, only True"),
    ("gpt2", dict(is_causal=0), "is_causal=0 is not supported, only True"),
    ("bert", dict(is_causal=True), "is_causal=True is not supported, only False or null (transf"),
    ("bert", dict(problem_type="regression"), "problem_type='regression' is not supported, only"),
    ("bert", dict(num_labels=3, id2label={"0": "a", "1": "b"}), "num_labels=3 and id2label with 2"),
    ("bert", dict(num_attention_heads=5), "hidden_size=36 is not a multiple of num_attention_he"),
    ("distilbert", dict(n_heads=5), "dim=36 is not a multiple of n_heads=5"),
    ("distilbert", dict(hidden_size=48), "hidden_size=48 and dim=36 are two values of one field"),
    ("distilbert", dict(activation="tanhexp"), "activation='tanhexp' is not supported; these are"),
    ("distilbert", dict(is_decoder=True), "is_decoder=True is not supported, only False or null"),
    ("electra", dict(is_decoder=True), "is_decoder=True is not supported, only False or null"),
    ("electra", dict(embedding_size=0), "embedding_size=0 is below 1"),
    ("modernbert", dict(num_attention_heads=5), "hidden_size=36 is not a multiple of num"),
    ("modernbert", dict(sliding_window=9), "sliding_window=9 is not supported, only null"),
    ("modernbert", dict(rope_theta=9.0), "rope_theta=9.0 is not supported, only null (it"),
    ("modernbert", dict(head_dim=8), "head_dim=8 is not supported, only null (it is not"),
    ("modernbert", dict(classifier_pooling="max"), "classifier_pooling='max' is not support"),
    ("modernbert", dict(rope_parameters={FULL: dict(rope_type="dynamic", factor=2.0)}),
     "rope_type='dynamic' is not supported; these are: default, linear, llama3, yarn"),
    ("ministral3", rope(rope_type="linear", factor=2.0, llama_4_scaling_beta=0.1),
     "rope_type='linear' is not supported; these are: yarn"),
    ("ministral3", rope(rope_type="yarn", factor=2.0),
     "rope_parameters.llama_4_scaling_beta=None is not a number of at least 0"),
    ("ministral3", dict(rope_scaling=dict(rope_type="yarn", factor=2.0)),
     "rope_scaling={'rope_type': 'yarn', 'factor': 2.0} is not supported, only null (rope_param"),
    ("ministral3", dict(rope_parameters=3), "rope_parameters=3 is not a mapping"),
    ("roberta", dict(pad_token_id=None), "pad_token_id=None is not an integer; absent means 1"),
    ("qwen3", dict(head_dim=None), "head_dim=None is not an integer; absent means 128"),
    ("qwen3", dict(use_qk_norm=False), "use_qk_norm=False is not supported, only True"),
    ("llama", dict(use_qk_norm=True), "use_qk_norm=True is not understood for model_type='llama'"),
    ("llama", dict(sliding_window=4096), "sliding_window=4096 is not supported, only null (trans"),
    ("llama", dict(attention_chunk_size=8), "attention_chunk_size=8 is not supported, only null"),
    ("llama", dict(pruned_heads={"0": [1]}), "pruned_heads={'0': [1]} is not supported, only null"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported, only"),
    ("llama", dict(layer_types=[FULL]), "layer_types=['full_attention'] must name full_attentio"),
    ("llama", dict(some_field="x" * 99), "some_field='" + "x" * 76 + "... is not understood"),
    ("llama", dict(quantization_config={"quant_method": "awq", "bits": 4}), "quantization_config="
     "'awq': the weights are quantised in a way that is not read for model_type='llama'; give "
     "the model that they were made from (base_dtype=nf4 or int8 quantises it here), or one in FP"),
    *(("llama", quantized(method), f"quantization_config='{method}': the weights are quantised in")
      for method in ("gptq", "aqlm", "hqq", "eetq", "quanto", "compressed-tensors", "torchao")),
    ("llama", quantized("fp8", weight_block_size=[128, 0]), "quantization_config.weight_block_siz"
     "e=[128, 0] is not supported, only two numbers from 1 to 1048576"),
    ("llama", quantized("fp8", weight_block_size=[1, 2**40]), "weight_block_size=[1, 10995116277"),
    ("llama", quantized("fp8", fmt="e5m2"), "quantization_config.fmt='e5m2' is not supported, onl"),
    ("llama", quantized("fp8", expert_dtype="fp4"), "expert_dtype='fp4' is not supported, only fp"),
    ("llama", quantized("fp8", rotation="x"), "quantization_config.rotation='x' is not understood "
     "for quant_method='fp8' and may change the weights; if it does not, set ignore_config_fiel"),
    ("llama", quantized("fp8", modules_to_not_convert="lm_head"), "='lm_head' is not supported, o"),
    ("llama", quantized("bitsandbytes"), "one of load_in_4bit and load_in_8bit must be true"),
    ("llama", quantized("bitsandbytes", load_in_4bit=True, load_in_8bit=True), "one of load_in_4"),
    ("llama", quantized("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="af4"), "'af4' is"),
    ("llama", quantized(["fp8"]), "quantization_config=['fp8']: the weights are quantised in a w"),
    ("llama", dict(quantization={"bits": 4}), "quantization={'bits': 4}: the weights are quantis"),
    ("gemma2", dict(sliding_window_size=8), "sliding_window_size=8 is not supported, only 4096 or"),
    ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0 is not above 0"),
    ("gemma2", dict(final_logit_softcapping=0), "final_logit_softcapping=0 is not above 0; null"),
    ("mixtral", dict(num_experts=3), "num_experts=3 and num_local_experts=5 are two values of on"),
    ("qwen2", dict(vocab_size="many"), "vocab_size='many' is not an integer"),
    ("qwen2", dict(vocab_size=True), "vocab_size=True is not an integer"),
    ("qwen2", dict(num_key_value_heads=4), "num_attention_heads=6 is not a multiple of num_key_"),
    ("qwen2", dict(num_hidden_layers=0), "num_hidden_layers=0 is below 1"),
    ("qwen2", dict(max_window_layers=-1), "max_window_layers=-1 is below 0"),
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
    ("mixtral", dict(num_experts_per_tok=6), "num_experts_per_tok=6 is above the number of expe"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), "mlp_only_layers=[1] is not supported, only [] or"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported, only 1"),
    ("qwen3_moe", dict(num_experts_per_tok=11), "num_experts_per_tok=11 is above the number of ex"),
    ("qwen3_next", dict(num_experts_per_tok=7), "num_experts_per_tok=7 is above the number of exp"),
    ("qwen3_next", dict(full_attention_interval=9), "no layer has full_attention, and a cache wit"),
    ("qwen3_5_text", dict(output_gate_type="sigmoid"), "output_gate_type='sigmoid' is not support"),
    ("gpt_oss", dict(num_experts_per_tok=6), "num_experts_per_tok=6 is above the number of exp"),
    ("gpt_oss", dict(swiglu_limit=0), "swiglu_limit=0 is not above 0"),
    ("gpt_oss", dict(sliding_window=None), "sliding_window is null or not in use"),
    ("gpt_oss", dict(quantization_config={"quant_method": "gptq"}), "'gptq': the weights are quan"),
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
    ("phi3", rope(**LONGROPE | dict(long_factor=[1.0, 2.0])), "long_factor has 2 numbers, for 3"),
    ("phi3", rope(**LONGROPE | dict(short_factor=2.0)), "short_factor=2.0 is not a list of"),
    ("phi3", rope(**LONGROPE | dict(short_factor=[1.0, "a", 2.0])), "short_factor=[1.0, 'a', 2.0]"),
    ("phi3", rope(**LONGROPE | dict(long_factor=[1.0, 0.0, 2.0])), "long_factor=[1.0, 0.0, 2.0]"),
    ("phi3", rope(**LONGROPE, partial_rotary_factor=0.7), "for 2 rotated pairs in a head"),
    ("gemma3_text", dict(rope_parameters={FULL: {}, "factor": 2}), "mix layer types and ['fac"),
    ("gemma3_text", dict(rope_parameters={FULL: 3}), "rope of full_attention=3 is not a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "text"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_named(family, fields, text):
    with pytest.raises(UserError) as caught:
        describe(family, **fields)
    assert text in str(caught.value)


def test_a_quantised_tower_is_named_outside_of_its_config():
    content = {"model_type": "mistral3", "text_config": dict(vocab_size=9) | quantized("fp8")}
    with pytest.raises(UserError, match="text_config: quantization_config='fp8': the weights are"):
        models.describe(content)


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(UserError, match="model_type='mamba' is not supported; these are: ") as told:
        models.describe({"model_type": "mamba"})
    assert all(name in str(told.value) for name in FAMILIES)
    with pytest.raises(UserError, match="model_type=None is not supported"):
        models.describe({})
    with pytest.raises(UserError, match="Did you mean 'qwen3'"):
        models.describe({"model_type": "qwen3x"})
    for text, words in (("llama", "supported: save that part"), ("mamba", "not supported either")):
        content = {"model_type": "llava", "text_config": {"model_type": text}}
        with pytest.raises(UserError, match=f"model_type='{text}', which is {words}"):
            models.describe(content)


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
