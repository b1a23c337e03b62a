"""Parts of the keys of caches: the program, the devices, and adapters before their first step."""

import dataclasses
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import data
from lora_jax.config import AdapterConfig
from lora_jax.train.checksums import digest_leaves

_PACKAGE = Path(__file__).parent.parent
_PACKAGES = ("lora_jax", "jax", "jaxlib", "flax", "transformers", "tokenizers", "jinja2")
# Settings of adapters without effect on the model that fresh plain LoRA starts with.
_SIZES = (
    *("rank", "alpha", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern"),
    *("alpha_pattern", "dropout", "use_rslora", "freeze_a", "lora_plus_ratio"),
)
_ZERO_UPDATE = ("default", "gaussian", "zero_a")  # inits with a zero factor


def environment(mesh: Mesh) -> dict[str, Any]:
    """Return versions, code and devices, which decide the last bits of numbers."""
    device = mesh.devices.flat[0]
    return {
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "code": data.digest_files(sorted(_PACKAGE.rglob("*.py"))),
        "devices": [
            *(device.device_kind, device.client.platform_version, platform.machine()),
            *(dict(mesh.shape), jax.process_count(), os.environ.get("XLA_FLAGS", "")),
            str(jax.config.values["jax_default_matmul_precision"]),
        ],
    }


def starts_as_base(settings: AdapterConfig) -> bool:
    """Return True if fresh adapters with these settings leave the model unchanged, bit for bit."""
    fresh = {name: getattr(AdapterConfig(), name) for name in _SIZES}
    init = "default" if settings.init in _ZERO_UPDATE else settings.init
    return dataclasses.replace(settings, **fresh, init=init) == AdapterConfig()


def describe_adapters(settings: AdapterConfig, adapters: Any) -> Any:
    """Return settings and weights of adapters that may change the model, None for others."""
    if starts_as_base(settings):
        return None
    return [dataclasses.asdict(settings), digest_leaves(adapters)]


def digest_content(content: Any) -> str:
    """Return the digest of anything that JSON can write."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
