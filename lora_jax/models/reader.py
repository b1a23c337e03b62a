"""A strict reader of config.json: every field is understood, known to be inert, or refused."""

from collections.abc import Callable, Container, Mapping
from typing import Any

from lora_jax import rope
from lora_jax.config import raise_all

FULL, SLIDING = "full_attention", "sliding_attention"

# Fields of config.json that do not enter the forward pass of a decoder.
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder
    is_llama_config label2id length_penalty max_length max_window_layers min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states
    output_past output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version transformers_weights typical_p unk_token_id use_bfloat16 use_cache
    unsloth_fixed unsloth_version
    """.split()
)

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
            self.refuse(f"{name}={value!r} is not {word}")
            return 1 if default is _REQUIRED else default
        return value

    def refuse(self, problem: str) -> None:
        """A problem that `finish` raises."""
        self._problems.append(f"config.json: {problem}")

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        value = self._get(name, default, int, "an integer")
        if value < least:
            self.refuse(f"{name}={value} is below {least}")
            return least
        return value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Absent: the default. Null: None."""
        default = None if name in self.content else default
        value = self._get(name, default, int, "an integer or null")
        if value is not None and value < 1:
            self.refuse(f"{name}={value} is below 1")
        return value

    def number(self, name: str, default: float) -> float:
        return float(self._get(name, default, (int, float), "a number"))

    def optional_number(self, name: str, default: float | None) -> float | None:
        """Absent: the default. Null: None."""
        default = None if name in self.content else default
        value = self._get(name, default, (int, float), "a number or null")
        return None if value is None else float(value)

    def boolean(self, name: str, default: bool) -> bool:
        return self._get(name, default, bool, "true or false")

    def choice(self, name: str, default: str, choices: Mapping[str, Any]) -> str:
        value = self._get(name, default, str, "a string")
        if value not in choices:
            self.refuse(f"{name}={value!r} is not supported; these are: {', '.join(choices)}")
        return value

    def labels(self) -> tuple[str, ...]:
        """The names of what a model tells apart, in the order of its outputs."""
        self._seen |= {"id2label", "label2id", "num_labels", "problem_type"}
        named = self.content.get("id2label") or {}
        numbers = {str(i) for i in range(len(named))}
        if not isinstance(named, Mapping) or {*map(str, named)} != numbers:
            self.refuse(f"id2label={named!r} does not number the labels")
            return ("0", "1")
        names = {int(number): str(name) for number, name in named.items()}
        return tuple(names[i] for i in range(len(names))) or ("LABEL_0", "LABEL_1")

    def refuse_unless_zero(self, name: str) -> None:
        """A field whose values other than 0, false or null change the numbers in a way that is not
        supported.
        """
        self._seen.add(name)
        if self.content.get(name) and name not in self.ignore:
            self.refuse(f"{name}={self.content[name]} is not supported, only 0")

    def refuse_unless(self, name: str, only: Any) -> None:
        """A field of which one value, the default, is supported."""
        self._seen.add(name)
        if self.content.get(name, only) != only:
            self.refuse(f"{name}={self.content[name]} is not supported, only {only}")

    def inert(self, *names: str) -> None:
        """Fields that say nothing about the numbers, in this family."""
        self._seen |= {*names}

    def layer_types(self, layers: int, usual: Callable[[int], bool]) -> tuple[str, ...]:
        """Which attention every layer has; without `layer_types`, `usual` says where it slides."""
        self._seen.add("layer_types")
        given = self.content.get("layer_types")
        if given is None:
            return tuple(SLIDING if usual(layer) else FULL for layer in range(layers))
        known = isinstance(given, list) and all(kind in (FULL, SLIDING) for kind in given)
        if not known or len(given) != layers:
            self.refuse(
                f"layer_types={given!r} must name {FULL} or {SLIDING} for each of {layers} layers"
            )
            return (FULL,) * layers
        return tuple(given)

    def rope(
        self,
        max_positions: int,
        head_dim: int,
        *,
        theta: float = 10000.0,
        local: tuple[str, float] | None = None,
        types: Container[str] = tuple(rope.FIELDS),
        partial: bool = False,
        original: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Rotary settings by layer type, from `rope_parameters` (transformers 5) or `rope_theta`
        and `rope_scaling` (before).

        `local` is the field with the theta of sliding layers and its default, where these have one
        of their own; `partial` allows heads that are rotated in part; `original` is the default of
        original_max_position_embeddings.
        """
        self._seen |= {"rope_theta", "rope_scaling", "rope_parameters", rope.ORIGINAL}
        self._seen |= {"partial_rotary_factor"} if partial else set()
        given = {}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.content.get(name) or {}
            if not isinstance(value, Mapping):
                self.refuse(f"{name}={value!r} is not a mapping")
                value = {}
            given |= value
        nested = {kind: given.pop(kind) or {} for kind in (FULL, SLIDING) if kind in given}
        for kind, values in nested.items():
            if not isinstance(values, Mapping):
                self.refuse(f"rope of {kind}={values!r} is not a mapping")
                nested[kind] = {}
        if nested and given:
            self.refuse(f"rope_parameters mix layer types and {list(given)}")
        usual = {"rope_theta": self.number("rope_theta", theta)}
        usual |= (
            {"partial_rotary_factor": self.number("partial_rotary_factor", 1)} if partial else {}
        )
        own = usual if local is None else {"rope_theta": self.number(*local)}
        if local is None and not nested:
            both = self._one_rope(usual | given, max_positions, head_dim, types, partial, original)
            return {FULL: both, SLIDING: both}
        given = {FULL: usual | given, SLIDING: own}
        return {
            kind: self._one_rope(
                values | nested.get(kind, {}), max_positions, head_dim, types, partial, original
            )
            for kind, values in given.items()
        }

    def _one_rope(
        self,
        given: dict[str, Any],
        max_positions: int,
        head_dim: int,
        types: Container[str],
        partial: bool,
        original: int | None,
    ) -> dict[str, Any]:
        found = {key: value for key, value in given.items() if value is not None}
        kind = found.setdefault("rope_type", found.get("type", "default"))
        found.pop("type", None)  # its name before transformers 4.43
        if kind in ("su", "yarn") and "longrope" in types and "yarn" not in types:
            kind = found["rope_type"] = "longrope"  # Phi-3's first names for it
        if kind not in types or kind not in rope.FIELDS:
            known = [name for name in rope.FIELDS if name in types]
            self.refuse(f"rope_type={kind!r} is not supported; these are: {', '.join(known)}")
            return found
        needed, optional = rope.FIELDS[kind]
        if missing := [name for name in needed if name not in found]:
            self.refuse(f"rope_type={kind!r} needs {', '.join(missing)}")
        known = {"rope_theta", "rope_type", rope.ORIGINAL, *needed, *optional}
        known |= {"partial_rotary_factor"} if partial else set()
        if unknown := sorted(set(found) - known):
            self.refuse(f"not understood for rope_type={kind!r}: {', '.join(unknown)}")
        if kind in ("llama3", "yarn", "longrope"):
            # As in transformers: what stands beside the mapping, or has a default, comes first.
            top = self.content.get(rope.ORIGINAL) or original
            found[rope.ORIGINAL] = top or found.get(rope.ORIGINAL) or max_positions
        values = {name: value for name, value in found.items() if name in known}
        for problem in rope.problems(head_dim, values):
            self.refuse(problem)
        if kind in ("dynamic", "longrope"):
            found["max_position_embeddings"] = max_positions
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
                self.refuse(
                    f"{name}={value!r} is not understood for "
                    f"model_type={self.model_type!r} and may change "
                    f"the numbers; if it does not, set ignore_config_fields=[{name}]"
                )
        raise_all(self._problems)
