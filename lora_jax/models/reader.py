"""A strict reader of config.json: every field is understood, known to be inert, or refused."""

from collections.abc import Container, Mapping
from typing import Any

from lora_jax.config import raise_all

# Fields of config.json that do not enter the forward pass of a decoder.
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length max_window_layers min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache unsloth_fixed
    unsloth_version
    """.split()
)

# What each rope_type needs besides rope_theta.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_REQUIRED = object()


class ConfigReader:
    """Reads typed fields of one config.json and, at `finish`, refuses every field that nobody
    understood.
    """

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
        """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and
        `rope_scaling` (before).
        """
        self._seen |= {"rope_theta", "rope_scaling", "rope_parameters"}
        found: dict[str, Any] = {"rope_theta": self.content.get("rope_theta")}
        for name in ("rope_scaling", "rope_parameters"):
            given = self.content.get(name) or {}
            if isinstance(given, Mapping):
                found |= {key: value for key, value in given.items() if value is not None}
            else:
                self._problems.append(f"config.json: {name}={given!r} is not a mapping")
        old_name = found.pop("type", "default")  # before transformers 4.43
        kind = found.setdefault("rope_type", old_name)
        found["rope_theta"] = found["rope_theta"] or 10000.0
        if kind not in types:
            self._problems.append(
                f"config.json: rope_type={kind!r} is not supported; these are: {', '.join(types)}"
            )
            return found
        if missing := [name for name in _ROPE_FIELDS[kind] if name not in found]:
            self._problems.append(f"config.json: rope_type={kind!r} needs {', '.join(missing)}")
        original = "original_max_position_embeddings"
        self._seen.add(original)
        if kind == "llama3":
            found.setdefault(original, self.content.get(original, max_positions))
        known = {"rope_theta", "rope_type", original, *_ROPE_FIELDS[kind]}
        if unknown := sorted(set(found) - known):
            self._problems.append(
                f"config.json: not understood for rope_type={kind!r}: {', '.join(unknown)}"
            )
        return found

    def finish(self) -> None:
        """Raise one `UserError` with everything missing, mistyped, unsupported or not
        understood.
        """
        for name, value in self.content.items():
            inactive = value is None or value is False or value == 0 or value == [] or value == {}
            if (
                name not in self._seen
                and name not in _INERT
                and name not in self.ignore
                and not inactive
            ):
                self._problems.append(
                    f"config.json: {name}={value!r} is not understood for "
                    f"model_type={self.model_type!r} and may change "
                    f"the numbers; if it does not, set ignore_config_fields=[{name}]"
                )
        raise_all(self._problems)
