"""LoRA fine-tuning of language models in JAX, as a pure transform of parameter trees.

model            = formats.load("path-or-hub-name")
params, adapters = lora.init(key, model.params, config)
bound            = lora.bind(params, adapters, config)
logits           = model.apply(bound, tokens)
merged           = lora.merge(bound)
"""

import importlib
from typing import Any

from lora_jax.config import AdapterConfig as AdapterConfig
from lora_jax.config import Config as Config
from lora_jax.config import UserError as UserError

_MODULES = {"lora": "lora_jax.adapters", "formats": "lora_jax.formats"}


def __getattr__(name: str) -> Any:
    """`lora` and `formats` on first use: they import jax, which takes seconds that `--help` need
    not spend.
    """
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
