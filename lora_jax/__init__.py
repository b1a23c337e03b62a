"""LoRA fine-tuning of language models in JAX, as a pure transform of parameter trees.

model            = formats.load("path-or-hub-name")
params, adapters = lora.init(key, model.params, config)
bound            = lora.bind(params, adapters, config)
logits           = model.apply(bound, tokens)
merged           = lora.merge(bound)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.config import AdapterConfig as AdapterConfig
    from lora_jax.config import Config as Config
    from lora_jax.errors import UserError as UserError

_MODULES = {"lora": "lora_jax.adapters", "formats": "lora_jax.formats"}
_NAMES = {"AdapterConfig": "config", "Config": "config", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    """Import on first use: `lora` and `formats` need jax, which takes seconds that `--help` need
    not spend, and the command line must take a Ctrl-C before it imports anything.
    """
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(importlib.import_module(f"lora_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
