"""One YAML file, one dataclass: `settings` has every setting, its default and its meaning.

    config = load("configs/quickstart.yaml", ["train.steps=10", "adapter.rank=8"])

Unknown keys, wrong types and impossible values are collected and raised together as one
`UserError`.
"""

from lora_jax.config.adapter import DATA_INITS, VIRTUAL_TOKEN_METHODS, AdapterConfig
from lora_jax.config.checks import check, merge_problem
from lora_jax.config.files import dump, load, parse
from lora_jax.config.objective import (
    OBJECTIVES,
    ObjectiveConfig,
    beta_of,
    is_normalized,
    sft_weight_of,
)
from lora_jax.config.options import LARGEST_SEED, options_of
from lora_jax.config.settings import (
    ENCODING_KEYS,
    LOSSES,
    PRINTS,
    TRACKERS,
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    HostsConfig,
    MeshConfig,
    TrainConfig,
    all_keys,
    virtual_tokens,
)
from lora_jax.config.text import expand, is_directory, is_file, quoted, read_json, read_text, shown
from lora_jax.config.types import is_finite
from lora_jax.config.unused import find_unused

__all__ = [
    "DATA_INITS",
    "ENCODING_KEYS",
    "LARGEST_SEED",
    "LOSSES",
    "OBJECTIVES",
    "PRINTS",
    "TRACKERS",
    "VIRTUAL_TOKEN_METHODS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "HostsConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "TrainConfig",
    "all_keys",
    "beta_of",
    "check",
    "dump",
    "expand",
    "find_unused",
    "is_directory",
    "is_file",
    "is_finite",
    "is_normalized",
    "load",
    "merge_problem",
    "options_of",
    "parse",
    "quoted",
    "read_json",
    "read_text",
    "sft_weight_of",
    "shown",
    "virtual_tokens",
]
