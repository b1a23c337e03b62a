"""One YAML file, one dataclass: every setting, its default and its meaning stand in `settings`.

    config = load("configs/quickstart.yaml", ["train.steps=10", "adapter.rank=8"])

Unknown keys, wrong types and impossible values are collected and raised together as one
`UserError`.
"""

from lora_jax.config.checks import LARGEST_SEED, adapter_problems, check, merge_problem
from lora_jax.config.files import dump, load, parse
from lora_jax.config.settings import (
    DATA_INITS,
    PRINTS,
    SOFT,
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    HostsConfig,
    MeshConfig,
    TrainConfig,
    UserError,
    all_keys,
    nearest,
    raise_all,
    virtual_tokens,
)
from lora_jax.config.text import expand, is_directory, is_file, read_json, read_text, shown

__all__ = [
    "DATA_INITS",
    "LARGEST_SEED",
    "PRINTS",
    "SOFT",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "HostsConfig",
    "MeshConfig",
    "TrainConfig",
    "UserError",
    "adapter_problems",
    "all_keys",
    "check",
    "dump",
    "expand",
    "is_directory",
    "is_file",
    "load",
    "merge_problem",
    "nearest",
    "parse",
    "raise_all",
    "read_json",
    "read_text",
    "shown",
    "virtual_tokens",
]
