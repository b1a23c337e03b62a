"""What every family shares: a strict reader of config.json, the scan over stacked layers, and the `Model` value."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.config import raise_all
from lora_jax.layers import Cache
from lora_jax.sharding import Rules

# Fields of config.json that do not enter the forward pass of a decoder.
_INERT = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures attn_implementation auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length max_window_layers
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id use_bfloat16 use_cache
    unsloth_fixed unsloth_version""".split()
)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_REQUIRED = object()


class ConfigReader:
    """Reads typed fields of one config.json and, at `finish`, refuses every field that nobody understood."""

    def __init__(self, content: Mapping[str, Any], ignore: Container[str] = ()):
        self.content, self.ignore = content, ignore
        self.model_type = content.get("model_type")
        self._seen: set[str] = set()
        self._problems: list[str] = []

    def _get(self, name: str, default: Any, kind: type | tuple[type, ...], word: str) -> Any:
        self._seen.add(name)
        value = self.content.get(name)
        if value is None:
            if default is _REQUIRED:
                self._problems.append(f"config.json has no {name}")
                return 1  # a stand-in: `finish` raises before it is used
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self._problems.append(f"config.json: {name}={value!r} is not {word}")
            return 1 if default is _REQUIRED else default
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self._get(name, default, int, "an integer")
        if value < 1:
            self._problems.append(f"config.json: {name}={value} is not positive")
            return 1
        return value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Absent: the default. Null: None."""
        return self._get(name, None if name in self.content else default, int, "an integer or null")

    def number(self, name: str, default: float) -> float:
        return float(self._get(name, default, (int, float), "a number"))

    def boolean(self, name: str, default: bool) -> bool:
        return self._get(name, default, bool, "true or false")

    def choice(self, name: str, default: str, choices: Mapping[str, Any]) -> str:
        value = self._get(name, default, str, "a string")
        if value not in choices:
            self._problems.append(
                f"config.json: {name}={value!r} is not supported; these are: {', '.join(choices)}"
            )
        return value

    def refuse_unless_zero(self, name: str) -> None:
        """A field whose non-zero values change the numbers in a way that is not supported."""
        if self.number(name, 0.0) and name not in self.ignore:
            self._problems.append(
                f"config.json: {name}={self.content[name]} is not supported, only 0"
            )

    def rope_parameters(self, types: tuple[str, ...], max_positions: int) -> dict[str, Any]:
        """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        self._seen |= {"rope_theta", "rope_scaling", "rope_parameters"}
        found = {"rope_theta": self.content.get("rope_theta"), "rope_type": "default"}
        for name in ("rope_scaling", "rope_parameters"):
            given = self.content.get(name) or {}
            if not isinstance(given, Mapping):
                self._problems.append(f"config.json: {name}={given!r} is not a mapping")
                continue
            found |= {key: value for key, value in given.items() if value is not None}
        found["rope_theta"] = found["rope_theta"] or 10000.0
        found["rope_type"] = kind = (
            found.get("type", found["rope_type"])
            if found["rope_type"] == "default"
            else found["rope_type"]
        )
        found.pop("type", None)
        needs = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        }
        if kind not in types:
            self._problems.append(
                f"config.json: rope_type={kind!r} is not supported; these are: {', '.join(types)}"
            )
        elif missing := [name for name in needs[kind] if name not in found]:
            self._problems.append(f"config.json: rope_type={kind!r} needs {', '.join(missing)}")
        if kind == "llama3":
            found.setdefault(
                "original_max_position_embeddings",
                self.content.get("original_max_position_embeddings", max_positions),
            )
            self._seen.add("original_max_position_embeddings")
        known = {
            "rope_theta",
            "rope_type",
            "original_max_position_embeddings",
            *needs.get(kind, ()),
        }
        if kind in types and (unknown := sorted(set(found) - known)):
            self._problems.append(
                f"config.json: rope settings not understood for rope_type={kind!r}: {', '.join(unknown)}"
            )
        return found

    def finish(self) -> None:
        """Raise one `UserError` with everything missing, mistyped, unsupported or not understood."""
        for name, value in self.content.items():
            inactive = value is None or value is False or value == 0 or value == [] or value == {}
            if (
                name not in self._seen
                and name not in _INERT
                and name not in self.ignore
                and not inactive
            ):
                self._problems.append(
                    f"config.json: {name}={value!r} is not understood for model_type={self.model_type!r} and may change "
                    f"the numbers; if it does not, set ignore_config_fields=[{name}]"
                )
        raise_all(self._problems)


def storage_dtype(content: Mapping[str, Any]) -> Any:
    """The dtype that config.json names for the weights, float32 if it names none."""
    return _DTYPES.get(
        str(content.get("dtype") or content.get("torch_dtype") or "float32"), jnp.float32
    )


def scan_layers(
    block: Callable, layers: nnx.Module, x: jax.Array, cached: Any, remat: str
) -> tuple[jax.Array, Any]:
    """Run `block(x, layer, cached) -> (x, out)` over stacked layers; `remat` says what the backward pass keeps."""
    graphdef, state = nnx.split(layers)

    def body(x, slices):
        state, cached = slices
        return block(x, nnx.merge(graphdef, state), cached)

    policies = jax.checkpoint_policies
    match remat:
        case "full":
            body = jax.checkpoint(body, prevent_cse=False)
        case "dots":
            body = jax.checkpoint(
                body, prevent_cse=False, policy=policies.dots_with_no_batch_dims_saveable
            )
        case "offload":
            keep = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
            body = jax.checkpoint(body, prevent_cse=False, policy=keep)
    return jax.lax.scan(body, x, (state, cached))


@dataclass(frozen=True)
class Model:
    """A model as a value: its static structure and a tree of frozen parameters (arrays, or only their shapes)."""

    graphdef: Any
    template: Any  # NNX state of shapes, the form that `graphdef` is merged with
    params: dict
    config: Any  # the family's Config
    hf_config: dict[str, Any]  # config.json as it was read
    rules: Rules
    directory: Path = Path()  # where its files are

    def module(self, params: Mapping) -> Any:
        """The NNX module over `params` (plain, bound or merged), with methods `hidden` and `logits`."""
        state = jax.tree.map(lambda leaf: leaf, self.template)
        nnx.replace_by_pure_dict(state, _keys_like(params))
        return nnx.merge(self.graphdef, state)

    def apply(
        self,
        params: Mapping,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute_dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Logits (b, t, vocab) of tokens (b, t). Without segment_ids all tokens of a row are one text."""
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        module = self.module(params)
        hidden, _ = module.hidden(
            tokens, positions=positions, segment_ids=segment_ids, compute_dtype=compute_dtype
        )
        return module.logits(hidden)

    def empty_cache(self, rows: int, slots: int, dtype: Any) -> Cache:
        """A cache for `rows` texts of up to `slots` tokens."""
        from lora_jax.layers import empty_cache

        c = self.config
        return empty_cache(
            c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim, dtype
        )

    def replace(self, **changes: Any) -> "Model":
        return dataclasses.replace(self, **changes)


def _keys_like(params: Mapping) -> dict:
    return {
        key: _keys_like(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }
