"""Local directories of models: given, converted from GGUF, from the hub, or demos."""

import hashlib
import os
import re
from pathlib import Path

from lora_jax import demo
from lora_jax.cache import cache_directory
from lora_jax.config import expand, is_directory, is_file, shown
from lora_jax.config.text import exists
from lora_jax.errors import UserError
from lora_jax.formats import gguf
from lora_jax.formats.side_files import SIDE_FILES

_HUB_NAME = re.compile(r"(?![.~])[\w.-]+/[\w.-]+")
_SMALL = ["*.json", "*.jinja", "*.txt", *SIDE_FILES]  # config, tokenizer, templates, licence


def resolve(spec: str, weights: bool = True) -> Path:
    """Return the local directory of a model: a directory, a .gguf file (converted once),
    `org/name` on the hub, or `demo:NAME`.

    With `weights=False` only the small files of a hub model are downloaded.

    Raises:
        UserError: no model has this name, or the hub cannot be reached.
    """
    if spec.startswith("demo:"):
        return resolve(str(demo.path(spec.removeprefix("demo:"))))
    path = expand(spec, "model")
    name = f"model={spec!r}"
    if is_directory(path, name):
        if not exists(path / "config.json"):
            if is_file(path / "adapter_config.json"):
                raise UserError(
                    f"model={spec!r} is the directory of an adapter; give its base as the model, "
                    "and the directory as the adapter (adapter.path, or --adapter)"
                )
            raise UserError(
                f"model={spec!r} is a directory without config.json; give a Hugging Face model "
                "directory"
            )
        return path
    if path.suffix == ".gguf" and is_file(path, name):
        return _converted(path)
    if exists(path, name):
        raise UserError(
            f"model={shown(repr(spec))} is not a directory; give a model directory, a .gguf file, "
            "or org/name on the hub"
        )
    if _HUB_NAME.fullmatch(spec):
        return _download(spec, weights)
    raise UserError(
        f"model={shown(repr(spec))} does not exist; give a Hugging Face model directory, a "
        ".gguf file, org/name on the hub, "
        "or demo:smollm2-135m-instruct"
    )


def public_name(spec: str) -> str:
    """Return the name by which other programs find a model: its name on the hub, also for a demo,
    or the absolute path of its directory (for a .gguf file, of the converted one).
    """
    if spec.startswith("demo:") and (origin := demo.origin(spec.removeprefix("demo:"))):
        return origin.name
    return spec if is_hub_name(spec) else str(resolve(spec).absolute())


def is_hub_name(spec: str) -> bool:
    """Return True for org/name that is not a local path."""
    return bool(_HUB_NAME.fullmatch(spec)) and not Path(spec).exists()


def _converted(source: Path) -> Path:
    """Convert a GGUF file into the cache, again if the file changed."""
    state = source.stat()
    mark = hashlib.sha256(
        f"{source.name} {state.st_size} {state.st_mtime_ns}".encode()
    ).hexdigest()[:12]
    return gguf.convert(source, cache_directory() / "converted" / f"{source.stem}-{mark}")


def _download(repository: str, weights: bool) -> Path:
    """Download a model of the hub into the cache of huggingface_hub."""
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, "*.safetensors"] if weights else _SMALL
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"]
            )
        )
    except Exception as error:  # httpx, hub and OS errors alike: offline, unknown, gated, full disk
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        offline = (
            " (HF_HUB_OFFLINE is set)"
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
            else ""
        )
        raise UserError(
            f"model={repository!r} is not a local directory and could not be fetched from the "
            f"Hugging Face hub{offline}: "
            f"{reason}\nGive a local directory, check the name, or log in with `hf auth login` if "
            "it is gated"
        ) from error
