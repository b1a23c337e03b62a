"""Every field of config.json that the sources of transformers read is decided here.

The sources are read as text: a release that reads another field fails with its name and line.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from lora_jax import models
from lora_jax.models import fields
from lora_jax.models.reader import ConfigReader

from ..towers import TOWERS

ROOT = Path(importlib.util.find_spec("transformers").origin).parent
FOLDERS = {
    **{"gemma3_text": "gemma3", "gemma4_text": "gemma4", "qwen3_5_text": "qwen3_5"},
    "xlm-roberta": "xlm_roberta",
}
SHARED = (
    "cache_utils.py",
    "configuration_utils.py",
    "core_model_loading.py",
    "integrations/flash_attention.py",
    "integrations/flex_attention.py",
    "integrations/heterogeneity/configuration_utils.py",
    "integrations/moe.py",
    "integrations/sdpa_attention.py",
    "loss/loss_utils.py",
    "masking_utils.py",
    "modeling_flash_attention_utils.py",
    "modeling_layers.py",
    "modeling_rope_utils.py",
    "modeling_utils.py",
    "utils/generic.py",
    "utils/output_capturing.py",
)
NAMES = {"config", "decoder_config", "effective_config", "layer_config", "text_config"}
# Parts of those files for other models: images, and heads for other uses than ours.
OTHER_CLASSES = {
    "Gemma3Config",
    "Gemma3ForConditionalGeneration",
    "Gemma3Model",
    "Gemma3MultiModalProjector",
    "Gemma4ForConditionalGeneration",
    "Gemma4Model",
    "Gemma4MultimodalEmbedder",
    "Gemma4PreTrainedModel",
    "GenericForTokenClassification",
    "MtpCandidateGenerator",
    "MtpLayer",
    "MtpModel",
    "Qwen3_5Config",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5Model",
    "Qwen3_5VisionAttention",
    "Qwen3_5VisionConfig",
    "Qwen3_5VisionMLP",
    "Qwen3_5VisionModel",
    "Qwen3_5VisionPatchEmbed",
    "Qwen3_5VisionPatchMerger",
    "Qwen3_5VisionRotaryEmbedding",
}
OTHER_STARTS = ("Gemma4Audio", "Gemma4Clippable", "Gemma4Vision")


def is_config(node, in_config):
    """An expression for a model's config: `config`, `self.config`, `x.get_text_config()`; `self`
    and `kwargs` in the methods of a config class.
    """
    match node:
        case ast.Name(id=name):
            return name in NAMES or (in_config and name in ("self", "kwargs"))
        case ast.Attribute(attr=name):
            return name in NAMES
        case ast.Call(func=ast.Attribute(attr="get_text_config")):
            return True
    return False


def reads(node, in_config=False):
    """Yield (field, line) of every attribute and key that is read from a config below `node`."""
    if isinstance(node, ast.ClassDef):
        if node.name in OTHER_CLASSES or node.name.startswith(OTHER_STARTS):
            return
        in_config = node.name.endswith(("Config", "ConfigMixin"))
    match node:
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[base, ast.Constant(name), *_]):
            if is_config(base, in_config):
                yield name, node.lineno
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="kwargs"), attr="get" | "pop"),
            args=[ast.Constant(name), *_],
        ) if in_config:
            yield name, node.lineno
        case ast.Compare(left=ast.Constant(str(name)), comparators=[ast.Name(id="kwargs")]):
            if in_config:
                yield name, node.lineno
        case ast.Attribute(value=base, attr=name, ctx=ast.Load()) if is_config(base, in_config):
            yield name, node.lineno
    method = node.func if isinstance(node, ast.Call) else None
    for child in ast.iter_child_nodes(node):
        if child is method and isinstance(child, ast.Attribute):
            child = child.value  # a method of a config is no field of it
        yield from reads(child, in_config)


@cache
def scan(file):
    """{field: line} of a source of transformers."""
    return dict(reversed(list(reads(ast.parse((ROOT / file).read_text(encoding="utf-8"))))))


@cache
def known(family):
    reader = ConfigReader({"model_type": family})
    models.FAMILIES[family].read_config(reader)
    return reader.known


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_field_that_transformers_reads_is_decided(family):
    folder = FOLDERS.get(family, family)
    files = [f"models/{folder}/{kind}_{folder}.py" for kind in ("modeling", "configuration")]
    found = [scan(file) for file in files]
    if family not in TOWERS:  # the text of some is in the files of another family
        size = "dim" if family == "distilbert" else "hidden_size"
        assert len(found[0]) > 12 and {size, "vocab_size"} <= found[0].keys()
    decided = known(family) | NOT_FIELDS | (OF_IMAGES if family in TOWERS else set())
    undecided = [
        f"{file}:{line} reads {name}"
        for file in (*files, *SHARED)
        for name, line in scan(file).items()
        if name not in decided and not name.startswith("__")
    ]
    assert not undecided, f"{family}: no decision in lora_jax/models: {undecided}"


def test_the_scan_sees_each_way_to_read_a_field():
    text = """
class TinyConfig:
    def __post_init__(self, **kwargs):
        self.stored = self.one if "two" in kwargs else kwargs.pop("three", kwargs.get("four"))
class Attention:
    def __init__(self, config, other):
        self.config, config.written = config, other.seven
        self.x = getattr(config, "five", None) or hasattr(self.config, "six")
        self.y = self.config.eight + config.get_text_config().nine + config.ten.eleven
        self.z = config.to_dict()
"""
    found = {name for name, _ in reads(ast.parse(text))}
    assert found == {"one", "two", "three", "four", "five", "six", "eight", "nine", "ten"}


def test_every_field_has_one_decision():
    groups = (fields.HARMLESS, fields.TRAINING, fields.RESTRICTED.keys(), fields.QUANTIZED)
    assert sum(map(len, groups)) == len(set().union(*groups))


# Fields of `vision_config`, which is not read.
OF_IMAGES = frozenset(
    """
    deepstack_visual_indexes depth fullatt_block_indexes image_size in_channels layer_norm_eps
    num_channels num_position_embeddings out_hidden_size patch_size spatial_merge_size
    temporal_patch_size window_size
    """.split()
)
# Attributes of configs and of the objects around them that are no fields of config.json, or that
# transformers does not take from there.
NOT_FIELDS = frozenset(
    # State and class attributes.
    """
    _attn_implementation_internal _auto_class _configuration_file _experts_implementation_internal
    _from_auto _from_pipeline _heterogeneity_spec _is_quantized _output_attentions _post_init_done
    _rope_type_labels allow_global_per_layer_attribute_access base_model_pp_plan base_model_tp_plan
    default_rope_type default_theta hf_quantizer ignore_keys_at_rope_validation is_heterogeneous
    per_layer_attributes serialize_explicit_per_layer_config sub_configs sub_configs_defaults
    validate
    """.split()
    # Arguments of from_pretrained and save_pretrained.
    + """
    cache_dir commit_message force_download gguf_file local_files_only proxies repo_id
    return_unused_kwargs revision subfolder token trust_remote_code
    """.split()
)
