"""Model and adapter directories that are damaged or hostile, read as the commands read them."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np

from lora_jax import adapters as methods
from lora_jax import data, formats
from lora_jax.config import AdapterConfig
from lora_jax.data import Row
from lora_jax.formats import fingerprint
from lora_jax.models.common import Model
from lora_jax.targets import find_trainable

from ..packed import pack
from ..train.tiny import write_model
from . import watch
from .damage import HOSTILE, damage_bytes, damage_json, damage_kind, damage_tensors
from .templates import HOSTILE_TEMPLATES

ADAPTERS = {
    "plain": dict(rank=4),
    "patterns": dict(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0}),
    "dora": dict(rank=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "saved": dict(rank=2, target_modules=["v_proj"], modules_to_save=["norm"]),
    "embedding": dict(rank=2, target_modules=["embed_tokens"]),
    "rows": dict(rank=2, target_modules=["k_proj"], trainable_token_indices=[1, 5]),
    "prompt": dict(method="prompt", num_virtual_tokens=3, prompt_init="random"),
    "prefix": dict(method="prefix", num_virtual_tokens=3, prompt_init="random"),
}
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": dict(model_type="qwen3", head_dim=8, tie_word_embeddings=False),
    "mixtral": dict(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1),
    "gemma": dict(model_type="gemma3_text", head_dim=8, sliding_window=8),
}
QUANTIZED = ("fp8 blocks", "nf4 nested", "int8")
# Fields that files do not have here and could have.
MORE = {
    "config.json": (
        *("rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "dtype"),
        *("layer_types", "quantization_config", "auto_map", "id2label", "num_labels", "labels"),
        *("eos_token_id", "pad_token_id", "transformers_weights", "attention_bias", "tie_x"),
        *(
            "tokenizer_class",
            "torch_dtype",
            "_name_or_path",
            "text_config",
            "partial_rotary_factor",
        ),
    ),
    "tokenizer_config.json": (
        *("auto_map", "chat_template", "added_tokens_decoder", "extra_special_tokens", "bos_token"),
        *("tokenizer_class", "model_max_length", "additional_special_tokens", "add_bos_token"),
        *("processor_class", "name_or_path", "padding_side", "eos_token", "unk_token"),
    ),
    "adapter_config.json": (
        *(
            "modules_to_save",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "auto_map",
        ),
        *("target_parameters", "trainable_token_indices", "init_lora_weights", "loftq_config"),
        *("num_virtual_tokens", "token_dim", "megatron_config", "revision", "eva_config", "bias"),
    ),
    "lora_jax.json": ("eos_token_id", "fingerprint", "chat_template_kwargs", "digest"),
    "generation_config.json": ("eos_token_id", "bos_token_id", "pad_token_id", "temperature"),
    "special_tokens_map.json": ("eos_token", "pad_token", "x"),
    "model.safetensors.index.json": ("weight_map", "metadata"),
}
EXTRA = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("model.safetensors.index.json", "chat_template.json", "lora_jax.json", "merges.txt"),
    *("adapter_config.json", "processor_config.json", "tokenizer.model", "chat_template.jinja"),
    *("additional_chat_templates/x.jinja", "tekken.json", "config.json"),
)


def open_cases(sandbox: Path) -> watch.Make:
    """Undamaged directories, and a maker of damaged copies of them."""
    bases = {}
    for name, fields in BASES.items():
        directory = write_model(sandbox / "bases" / name, **fields)
        (directory / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
        bases[name] = directory
    _shard(bases["qwen3"])
    for kind in QUANTIZED:
        plain = write_model(sandbox / "plain" / kind, tie_word_embeddings=False)
        bases[kind] = pack(plain, sandbox / "bases" / kind, kind)
    base = bases["llama"]
    model = formats.describe(base)
    _check_base(base)
    whole = formats.load(base)
    adapters = {}
    for name, settings in ADAPTERS.items():
        directory = sandbox / "adapters" / name
        _write_adapter(directory, whole, AdapterConfig(**settings), base)
        _check_adapter(directory, model, base)
        adapters[name] = directory

    def make(random: Random, place: Path) -> watch.Case:
        of_adapter = random.random() < 0.6
        name, source = random.choice(list((adapters if of_adapter else bases).items()))
        directory = place / name
        shutil.copytree(source, directory)
        done = [_damage(random, directory) for _ in range(random.choice((1, 1, 1, 2, 3)))]
        names = [str(directory), *(p.name for p in source.rglob("*") if p.is_file()), *EXTRA]
        names.append("chat template")
        if of_adapter:
            return (
                f"{name}: {'; '.join(done)}",
                names,
                lambda: _check_adapter(directory, model, base),
            )
        return f"{name}: {'; '.join(done)}", names, lambda: _check_base(directory)

    return make


def _shard(directory: Path) -> None:
    """Put the weights into two files with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {f"model-0000{i}-of-00002.safetensors": sorted(tensors)[i - 1 :: 2] for i in (1, 2)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_adapter(target: Path, model: Model, config: AdapterConfig, source: Path) -> None:
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        methods.shapes(model.params, config),
    )
    found = find_trainable(model.params, config)
    assert not formats.peft_problems(found)
    tokenizer = formats.load_tokenizer(source)
    prints = fingerprint.take(source, tokenizer, data.template_text(tokenizer, None))
    extra = {"fingerprint": prints, "chat_template_kwargs": {}, "eos_token_id": [2]}
    formats.write_adapter(
        target, tree, model.params, config, base_model=str(source), source=source, extra=extra
    )


def _damage(random: Random, directory: Path) -> str:
    """Damage one file; returns what was done."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())
    files = [file for file in files if file.stat().st_size < 1 << 24]
    if not files or random.random() < 0.1:
        return _add(random, directory)
    file = random.choice(files)
    kind = random.choice(("content", "content", "content", "bytes", "kind"))
    if kind == "kind":
        return damage_kind(random, file)
    name = file.relative_to(directory).as_posix()
    data = file.read_bytes()
    try:
        if kind == "content" and file.suffix == ".json":
            done, text = damage_json(random, data.decode(), MORE.get(file.name, ()))
            data = text.encode("utf-8", "surrogatepass")
        elif kind == "content" and file.suffix == ".safetensors":
            done, data = damage_tensors(random, data)
        elif kind == "content" and file.suffix == ".jinja":
            done = random.choice(HOSTILE_TEMPLATES)
            data = done.encode()
        else:
            done, data = damage_bytes(random, data)
    except (ValueError, LookupError):  # it was damaged before
        done, data = damage_bytes(random, data)
    file.write_bytes(data)
    return f"{name}: {done}"


def _add(random: Random, directory: Path) -> str:
    name = random.choice(EXTRA)
    file = directory / name
    if file.exists() or file.is_symlink():
        return damage_kind(random, file)
    file.parent.mkdir(exist_ok=True)
    key = random.choice(MORE.get(name, ("x",)))
    value = random.choice(HOSTILE)
    text = f'{{"{key}": {value}}}' if random.random() < 0.8 else random.choice(HOSTILE_TEMPLATES)
    file.write_text(text)
    return f"{name} with {text[:60]}"


# As the commands read them


def _check_base(directory: Path) -> None:
    """As `train` and `generate` read a model, up to the first step."""
    source = formats.resolve(str(directory))
    formats.describe(source)
    _check_tokenizer(source, source)
    model = formats.load(source)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


def _check_tokenizer(home: Path, source: Path) -> dict[str, str]:
    tokenizer = formats.load_tokenizer(home)
    prints = fingerprint.take(source, tokenizer, data.template_text(tokenizer, None))
    data.stop_tokens(tokenizer, None, formats.stop_tokens(source))
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    data.encode(Row(turns, f"{home} with a row"), tokenizer, max_length=64)
    return prints


def _check_adapter(directory: Path, model: Model, source: Path) -> None:
    """As `generate` and `eval` read an adapter."""
    adapters, config = formats.read_adapter(directory, model.params, model)
    home = directory if (directory / "tokenizer_config.json").is_file() else source
    prints = _check_tokenizer(home, source)
    stored = formats.read_fingerprint(directory)
    fingerprint.check(stored, prints, str(directory), ())
    formats.read_template_kwargs(directory)
    formats.read_stops(directory)
    shapes = methods.shapes(model.params, config)
    assert jax.tree.structure(shapes) == jax.tree.structure(adapters)
    for leaf, shape in zip(jax.tree.leaves(adapters), jax.tree.leaves(shapes), strict=True):
        assert leaf.shape == shape.shape and np.isfinite(leaf).all()


if __name__ == "__main__":
    watch.main(open_cases)
