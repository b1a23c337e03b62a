"""Conversion of GGUF files to Hugging Face directories, without torch: llama with a byte-level BPE
tokenizer, and the text part of Gemma 3 with its SentencePiece tokenizer.

    convert(Path("model.Q4_1.gguf"), Path("cache/model"))

    model.gguf ->  cache/model/config.json  generation_config.json  model.safetensors (float32)
                               tokenizer.json  tokenizer_config.json

Quantised tensors are dequantised. For llama, the rows of q and k are stored interleaved, for
llama.cpp's rotary embedding, and are put back into Hugging Face's order. For Gemma, the norms are
stored plus 1, which Hugging Face adds when it applies them. Formats: ggml's gguf.md, safetensors'
README.
"""

import json
import shutil
import uuid
from pathlib import Path

import gguf

from lora_jax.config import expand, is_file
from lora_jax.errors import UserError
from lora_jax.formats.gguf.config import KNOWN, make_config
from lora_jax.formats.gguf.header import check_header
from lora_jax.formats.gguf.metadata import check_types, metadata_value
from lora_jax.formats.gguf.tensors import plan_tensors, write_safetensors
from lora_jax.formats.gguf.tokenizer import read_tokenizer


def convert(source: str | Path, target: str | Path) -> Path:
    """Convert a GGUF file to a Hugging Face directory and return that; a finished `target` is kept.

    The directory appears complete or not at all, also if two processes convert at once.

    Raises:
        UserError: the file is missing, damaged or truncated; its architecture, tokenizer, tensors
            or settings are not supported; `target` is not a converted model, or cannot be written.
    """
    source, target = expand(source), expand(target)
    if (target / "config.json").is_file():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"cannot convert {source} into {target}: it exists and is not a converted model"
        )
    reader = _open(source)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise UserError(f"{source} is damaged or truncated: {error}") from error
    check_types(metadata, source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = metadata_value(metadata, "general.architecture", str, source)
    if architecture not in KNOWN:
        raise UserError(
            f"{source} has architecture {architecture!r}; supported: {', '.join(KNOWN)}"
        )
    config = make_config(architecture, metadata, tensors, source)
    plan = plan_tensors(architecture, config, tensors, source)
    tokenizer, tokenizer_config = read_tokenizer(metadata, config, source)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in ids if name in config}

    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        write_safetensors(partial / "model.safetensors", plan, tensors, source)
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, content in (
            ("tokenizer_config.json", tokenizer_config),
            ("generation_config.json", generation),
            ("config.json", config),
        ):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        # If the target is finished now, another process wrote the same content first.
        if not (target / "config.json").is_file():
            raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _open(source: Path) -> gguf.GGUFReader:
    if not is_file(source):
        raise UserError(f"GGUF file {source} does not exist")
    check_header(source)
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # The reader has no error type of its own: a cut file gives empty slices and wrong shapes.
        raise UserError(f"{source} is not a GGUF file, or damaged or truncated: {error}") from error
