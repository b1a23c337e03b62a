"""One YAML file, one dataclass: `settings` has every setting, its default and its meaning.

    config = load("configs/quickstart.yaml", ["train.steps=10", "adapter.rank=8"])

Unknown keys, wrong types and impossible values are collected and raised together as one
`UserError`.
"""

from lora_jax.config.adapter import DATA_INITS, VIRTUAL_TOKEN_METHODS, AdapterConfig
from lora_jax.config.checks import LARGEST_SEED, check, merge_problem
from lora_jax.config.files import dump, load, parse
from lora_jax.config.settings import (
    LOSSES,
    PRINTS,
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
from lora_jax.config.text import expand, is_directory, is_file, read_json, read_text, shown
from lora_jax.config.types import is_finite
from lora_jax.config.unused import find_unused

__all__ = [
    "DATA_INITS",
    "LARGEST_SEED",
    "LOSSES",
    "PRINTS",
    "VIRTUAL_TOKEN_METHODS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "HostsConfig",
    "MeshConfig",
    "TrainConfig",
    "all_keys",
    "check",
    "dump",
    "expand",
    "find_unused",
    "is_directory",
    "is_file",
    "is_finite",
    "load",
    "merge_problem",
    "parse",
    "read_json",
    "read_text",
    "shown",
    "virtual_tokens",
]
