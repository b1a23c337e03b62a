"""The table of checkpoints in README.md: the sizes are those of the models that are built."""

import math
import re
from pathlib import Path

import pytest

from lora_jax import models, tree

from .families import FULL, SLIDING
from .towers import TOWERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (`\w[^|]*?) \| ([^|]*\(\d[^|]*) \|$", README, re.M))
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 8}
FINE = {
    **{"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
    **{"mlp_only_layers": [], "norm_topk_prob": True},
}

DELTA = {
    **{"head_dim": 256, "full_attention_interval": 4, "linear_num_key_heads": 16},
    **{"linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
}


def decoder(vocabulary, width, inner, layers, heads, kv_heads, **more):
    """The fields of a published config.json that decide the size of a decoder."""
    return {
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv_heads, "tie_word_embeddings": False},
    } | more


def tied(*sizes, **more):
    return decoder(*sizes, tie_word_embeddings=True, **more)


def with_images(text):
    """The fields of a model that reads images, of which the text is counted."""
    return {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


def gemma4(*sizes, shared=0, full=None, every=6, **more):
    """The fields of a model with keys as values, if `full` heads have them without a window, or of
    a small one, whose layers have inputs of their own.
    """
    kinds = [FULL if layer % every == every - 1 else SLIDING for layer in range(sizes[3])]
    return tied(*sizes, layer_types=kinds, num_kv_shared_layers=shared, **more) | {
        **{"head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": full is not None},
        **{"num_global_key_value_heads": full, "vocab_size_per_layer_input": 262144},
        "hidden_size_per_layer_input": 0 if full else 256,
    }


def encoder(vocabulary, width=768, layers=12, heads=12, **more):
    return {
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
    } | more


ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
YARN = {
    "head_dim": 128,
    "rope_parameters": {
        **{"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0},
        **{"original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
}
PUBLISHED = {
    "llama": {
        "Llama-3.2-1B": tied(128256, 2048, 8192, 16, 32, 8),
        "Llama-3.2-3B": tied(128256, 3072, 8192, 28, 24, 8),
        "Llama-3.1-8B": decoder(128256, 4096, 14336, 32, 32, 8),
        "Llama-3.3-70B-Instruct": decoder(128256, 8192, 28672, 80, 64, 8),
        "Llama-2-7b-hf": decoder(32000, 4096, 11008, 32, 32, 32),
        "SmolLM2-135M": tied(49152, 576, 1536, 30, 9, 3),
        "SmolLM2-360M": tied(49152, 960, 2560, 32, 15, 5),
        "SmolLM2-1.7B": tied(49152, 2048, 8192, 24, 32, 32),
        "TinyLlama-1.1B-Chat-v1.0": decoder(32000, 2048, 5632, 22, 32, 4),
    },
    "mistral": {
        "Mistral-7B-v0.3": decoder(32768, 4096, 14336, 32, 32, 8),
        "Mistral-Nemo-Base-2407": decoder(131072, 5120, 14336, 40, 32, 8, head_dim=128),
        "Mistral-Small-24B-Base-2501": decoder(131072, 5120, 32768, 40, 32, 8, head_dim=128),
    },
    "ministral": {"Ministral-8B-Instruct-2410": decoder(131072, 4096, 12288, 36, 32, 8)},
    "qwen2": {
        "Qwen2.5-0.5B": tied(151936, 896, 4864, 24, 14, 2),
        "Qwen2.5-1.5B": tied(151936, 1536, 8960, 28, 12, 2),
        "Qwen2.5-7B": decoder(152064, 3584, 18944, 28, 28, 4),
        "Qwen2.5-32B": decoder(152064, 5120, 27648, 64, 40, 8),
        "Qwen2.5-72B": decoder(152064, 8192, 29568, 80, 64, 8),
    },
    "qwen3": {
        "Qwen3-0.6B": tied(151936, 1024, 3072, 28, 16, 8, head_dim=128),
        "Qwen3-1.7B": tied(151936, 2048, 6144, 28, 16, 8, head_dim=128),
        "Qwen3-4B": tied(151936, 2560, 9728, 36, 32, 8, head_dim=128),
        "Qwen3-8B": decoder(151936, 4096, 12288, 36, 32, 8, head_dim=128),
        "Qwen3-32B": decoder(151936, 5120, 25600, 64, 64, 8, head_dim=128),
    },
    "seed_oss": {
        "Seed-OSS-36B-Instruct": decoder(
            *(155136, 5120, 27648, 64, 80, 8),
            **{"head_dim": 128, "attention_bias": True, "attention_out_bias": False},
        )
    },
    "smollm3": {"SmolLM3-3B": tied(128256, 2048, 11008, 36, 16, 4)},
    "gemma": {
        "gemma-2b": tied(256000, 2048, 16384, 18, 8, 1, head_dim=256),
        "gemma-7b": tied(256000, 3072, 24576, 28, 16, 16, head_dim=256),
    },
    "gemma2": {
        "gemma-2-2b": tied(256000, 2304, 9216, 26, 8, 4, head_dim=256),
        "gemma-2-9b": tied(256000, 3584, 14336, 42, 16, 8, head_dim=256),
        "gemma-2-27b": tied(256000, 4608, 36864, 46, 32, 16, head_dim=128),
    },
    "gemma3_text": {
        "gemma-3-270m": tied(262144, 640, 2048, 18, 4, 1, head_dim=256),
        "gemma-3-1b-it": tied(262144, 1152, 6912, 26, 4, 1, head_dim=256),
    },
    "gemma3": {
        "gemma-3-4b-it": with_images(tied(262208, 2560, 10240, 34, 8, 4)),
        "gemma-3-12b-it": with_images(tied(262208, 3840, 15360, 48, 16, 8)),
        "gemma-3-27b-it": with_images(tied(262208, 5376, 21504, 62, 32, 16, head_dim=128)),
    },
    "gemma4": {
        "gemma-4-E2B-it": with_images(
            gemma4(*(262144, 1536, 6144, 35, 8, 1), use_double_wide_mlp=True, shared=20, every=5)
        ),
        "gemma-4-E4B-it": with_images(gemma4(262144, 2560, 10240, 42, 8, 2, shared=18)),
        "gemma-4-31B-it": with_images(gemma4(262144, 5376, 21504, 60, 32, 16, full=4)),
    },
    "gemma4_text": {"gemma-4-31B": gemma4(262144, 5376, 21504, 60, 32, 16, full=4)},
    "mistral3": {
        "Mistral-Small-3.1-24B-Instruct-2503": with_images(
            decoder(131072, 5120, 32768, 40, 32, 8, head_dim=128)
        ),
        "Ministral-3-3B-Base-2512": with_images(
            tied(131072, 3072, 9216, 26, 32, 8, **YARN, model_type="ministral3")
        ),
        "Ministral-3-14B-Base-2512": with_images(
            decoder(131072, 5120, 16384, 40, 32, 8, **YARN, model_type="ministral3")
        ),
    },
    "ministral3": {
        "Ministral-3-8B-Base-2512": decoder(131072, 4096, 14336, 34, 32, 8, **YARN),
    },
    "qwen2_5_vl": {
        "Qwen2.5-VL-3B-Instruct": with_images(tied(151936, 2048, 11008, 36, 16, 2)),
        "Qwen2.5-VL-7B-Instruct": with_images(decoder(152064, 3584, 18944, 28, 28, 4)),
    },
    "qwen3_vl": {
        "Qwen3-VL-4B-Instruct": with_images(tied(151936, 2560, 9728, 36, 32, 8)),
        "Qwen3-VL-8B-Instruct": with_images(decoder(151936, 4096, 12288, 36, 32, 8)),
    },
    "smolvlm": {
        "SmolVLM2-256M-Video-Instruct": with_images(decoder(49280, 576, 1536, 30, 9, 3)),
        "SmolVLM2-2.2B-Instruct": with_images(decoder(49280, 2048, 8192, 24, 32, 32)),
    },
    "phi3": {
        "Phi-3.5-mini-instruct": decoder(32064, 3072, 8192, 32, 32, 32),
        "phi-4": decoder(100352, 5120, 17920, 40, 40, 10),
    },
    "gpt2": {
        "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
        "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    },
    "olmo2": {
        "OLMo-2-0425-1B": decoder(100352, 2048, 8192, 16, 16, 16),
        "OLMo-2-1124-7B": decoder(100352, 4096, 11008, 32, 32, 32),
        "OLMo-2-1124-13B": decoder(100352, 5120, 13824, 40, 40, 40),
        "OLMo-2-0325-32B": decoder(100352, 5120, 27648, 64, 40, 8),
    },
    "olmo3": {
        "Olmo-3-1025-7B": decoder(100278, 4096, 11008, 32, 32, 32),
        "Olmo-3-1125-32B": decoder(100278, 5120, 27648, 64, 40, 8),
    },
    "granite": {
        "granite-3.3-2b-instruct": tied(49159, 2048, 8192, 40, 32, 8),
        "granite-3.3-8b-instruct": tied(49159, 4096, 12800, 40, 32, 8),
        "granite-4.0-micro": tied(100352, 2560, 8192, 40, 40, 8),
    },
    "arcee": {"AFM-4.5B-Base": decoder(128004, 2560, 18432, 36, 20, 4, head_dim=128)},
    "starcoder2": {
        "starcoder2-3b": tied(49152, 3072, 12288, 30, 24, 2),
        "starcoder2-7b": tied(49152, 4608, 18432, 32, 36, 4),
        "starcoder2-15b": decoder(49152, 6144, 24576, 40, 48, 4),
    },
    "nemotron": {
        "Minitron-4B-Base": decoder(256000, 3072, 9216, 32, 24, 8, head_dim=128),
        "Minitron-8B-Base": decoder(256000, 4096, 16384, 32, 48, 8, head_dim=128),
    },
    "phi": {
        "phi-1_5": decoder(51200, 2048, 8192, 24, 32, 32),
        "phi-2": decoder(51200, 2560, 10240, 32, 32, 32),
    },
    "cohere": {
        "c4ai-command-r-v01": tied(256000, 8192, 22528, 40, 64, 64),
        "c4ai-command-r-plus": tied(256000, 12288, 33792, 64, 96, 8, use_qk_norm=True),
        "aya-23-8B": tied(256000, 4096, 14336, 32, 32, 8),
    },
    "glm4": {
        "GLM-4-9B-0414": decoder(151552, 4096, 13696, 40, 32, 2),
        "GLM-4-32B-0414": decoder(151552, 6144, 23040, 61, 48, 2, attention_bias=False),
    },
    "exaone4": {
        "EXAONE-4.0-1.2B": tied(102400, 2048, 4096, 30, 32, 8),
        "EXAONE-4.0-32B": decoder(102400, 5120, 27392, 64, 40, 8),
    },
    "mixtral": {
        "Mixtral-8x7B-v0.1": decoder(32000, 4096, 14336, 32, 32, 8, **EXPERTS),
        "Mixtral-8x22B-v0.1": decoder(32768, 6144, 16384, 56, 48, 8, **EXPERTS),
    },
    "qwen3_moe": {
        "Qwen3-30B-A3B": decoder(
            *(151936, 2048, 6144, 48, 32, 4), head_dim=128, moe_intermediate_size=768, **FINE
        ),
        "Qwen3-235B-A22B": decoder(
            *(151936, 4096, 12288, 94, 64, 4), head_dim=128, moe_intermediate_size=1536, **FINE
        ),
    },
    "gpt_oss": {
        "gpt-oss-20b": decoder(201088, 2880, 2880, 24, 64, 8, num_local_experts=32),
        "gpt-oss-120b": decoder(201088, 2880, 2880, 36, 64, 8, num_local_experts=128),
    },
    "qwen3_next": {
        "Qwen3-Next-80B-A3B-Instruct": decoder(
            *(151936, 2048, 5120, 48, 16, 2),
            **{"head_dim": 256, "full_attention_interval": 4, "num_experts": 512},
            **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        ),
    },
    "qwen3_5_text": {"Qwen3.5-9B": decoder(248320, 4096, 12288, 32, 16, 4, **DELTA)},
    "qwen3_5": {
        "Qwen3.5-27B": with_images(
            decoder(248320, 5120, 17408, 64, 24, 4, **DELTA | {"linear_num_value_heads": 48})
        ),
    },
    "lfm2": {
        "LFM2-350M": tied(65536, 1024, 6656, 16, 16, 8, full_attn_idxs=[2, 5, 8, 10, 12, 14]),
        "LFM2-700M": tied(65536, 1536, 10240, 16, 24, 8, full_attn_idxs=[2, 5, 8, 10, 12, 14]),
        "LFM2-1.2B": tied(65536, 2048, 12288, 16, 32, 8, full_attn_idxs=[2, 5, 8, 10, 12, 14]),
    },
    "bert": {
        "bert-base-uncased": encoder(30522),
        "bert-large-uncased": encoder(30522, 1024, 24, 16),
        "all-MiniLM-L6-v2": encoder(30522, 384, 6),
    },
    "distilbert": {
        "distilbert-base-uncased": {"vocab_size": 30522},
        "distilbert-base-multilingual-cased": {"vocab_size": 119547},
    },
    "electra": {
        "electra-small-discriminator": encoder(30522, 256, 12, 4),
        "electra-base-discriminator": encoder(30522, embedding_size=768),
        "electra-large-discriminator": encoder(30522, 1024, 24, 16, embedding_size=1024),
    },
    "modernbert": {
        "ModernBERT-base": {"vocab_size": 50368},
        "ModernBERT-large": {
            **{"vocab_size": 50368, "hidden_size": 1024, "intermediate_size": 2624},
            **{"num_hidden_layers": 28, "num_attention_heads": 16},
        },
    },
    "roberta": {"roberta-base": encoder(50265, **ROBERTA)},
    "xlm-roberta": {"xlm-roberta-base": encoder(250002, **ROBERTA)},
    "camembert": {"camembert-base": encoder(32005, **ROBERTA)},
}


def listed(family):
    """Checkpoints and sizes in the table's row of a family; names without the owner."""
    (text,) = [text for kinds, text in ROWS.items() if f"`{family}`" in kinds]
    return dict(re.findall(r"([\w.-]+) \(([\d.]+[MB])\)", text))


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_sizes_are_those_of_the_models(family):
    for name, fields in PUBLISHED[family].items():
        leaves = tree.flatten(models.describe({"model_type": family} | fields).params)
        count = sum(math.prod(leaf.shape) for leaf in leaves.values())
        scale, unit = (1e9, "B") if count >= 0.9995e9 else (1e6, "M")
        number, text = count / scale, listed(family)[name]
        digits = len(text.rstrip("MB").partition(".")[2])
        assert text == f"{number:.{digits}f}{unit}", name


def test_the_table_lists_every_family_and_nothing_that_is_not_checked():
    assert set(PUBLISHED) == set(models.FAMILIES)
    names = {name for sizes in PUBLISHED.values() for name in sizes}
    assert {name for family in PUBLISHED for name in listed(family)} == names


def test_the_page_of_models_lists_every_family():
    """It names only checkpoints whose sizes are checked."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    supported, refused = page.split("## Not supported")
    rows = re.findall(r"^\| `(?!model_type)([\w-]+)` \| ([^|]+) \|", supported, re.M)
    assert sorted(family for family, _ in rows) == sorted(models.FAMILIES)
    for family, names in rows:
        assert {*names.split(", ")} <= PUBLISHED[family].keys(), family
    for family in TOWERS:
        (row,) = [line for line in supported.splitlines() if line.startswith(f"| `{family}` |")]
        assert row.endswith(
            ", ".join(f"`{m}`" for m in models.FAMILIES[family].NAMES.carried) + " |"
        )
    types = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", refused, re.M)))
    assert len(types) > 10 and not {*types} & models.FAMILIES.keys()
