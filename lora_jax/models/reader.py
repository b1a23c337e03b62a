"""A strict reader of config.json: each field is read, known to be harmless, or refused."""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

from lora_jax.config import is_finite, quoted, shown
from lora_jax.errors import raise_all
from lora_jax.models.fields import HARMLESS, QUANTIZED, RESTRICTED, TRAINING

FULL, SLIDING = "full_attention", "sliding_attention"
_ROTARY = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
# Largest values that are read, far above those of any model. Beyond them the shapes alone would
# take much memory and time, before they are compared with files.
_LARGEST = 2**31 - 1
_LARGEST_OF = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim"), 2**20),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 2**16),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 2**16),
    "num_labels": 100_000,
}


class ConfigReader:
    """Reader of typed fields of one config.json.

    An absent field has the default of the family's config class in transformers. `notes` collects
    fields that are not read as written; `finish` raises all fields that are mistyped, not supported
    or not understood.
    """

    def __init__(self, content: Mapping[str, Any], ignore: Container[str] = (), within: str = ""):
        # In transformers, rope_parameters replace fields of rotary positions that are null.
        null = [n for n in _ROTARY if n in content and content[n] is None]
        self.content = {name: value for name, value in content.items() if name not in null}
        self.ignore = ignore
        self.model_type = content.get("model_type")
        self.notes: list[str] = []
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._within = within  # the mapping of config.json, if it is not all of it
        self._inner: list[ConfigReader] = []

    @property
    def known(self) -> frozenset[str]:
        """Fields read so far, and fields of every family."""
        inner = frozenset().union(*(one._seen for one in self._inner))
        return inner | self._seen | HARMLESS | TRAINING | RESTRICTED.keys() | QUANTIZED

    def _get(
        self,
        name: str,
        default: Any,
        kind: type | tuple[type, ...],
        word: str,
        nullable: bool = False,
    ) -> Any:
        self._seen.add(name)
        value = self.content.get(name, default)
        if nullable and value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(f"{name}={quoted(value)} is not {word}; absent means {default!r}")
            return default
        return value

    def refuse(self, problem: str) -> None:
        """Add a problem for `finish` to raise."""
        where = f"{self._within}: " if self._within else ""
        self._problems.append(f"config.json: {where}{shown(problem)}")

    def inside(
        self, name: str, usual: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> "ConfigReader":
        """Return a reader of the mapping `name`, with fields that it has by default and fields that
        replace its own. Notes and problems are those of this reader.
        """
        self._seen.add(name)
        given = self.content.get(name)
        if given is not None and not isinstance(given, Mapping):
            self.refuse(f"{name}={quoted(given)} is not a mapping")
            given = None
        inner = ConfigReader({**usual, **(given or {}), **fixed}, self.ignore, name)
        inner.notes, inner._problems = self.notes, self._problems
        self._inner.append(inner)
        return inner

    def size(self, name: str, default: int) -> int:
        """Read an integer that config.json should have; a note says if it lacks it."""
        if name not in self.content:
            where = f"{self._within}." if self._within else ""
            self.notes.append(
                f"config.json has no {where}{name}: {default} is used, the default of transformers "
                f"for model_type={self.model_type!r}"
            )
        return self.integer(name, default)

    def integer(self, name: str, default: int, least: int = 1) -> int:
        """Read an integer of at least `least`."""
        value = self._get(name, default, int, "an integer")
        if value < least:
            self.refuse(f"{name}={quoted(value)} is below {least}")
            return least
        return least if self._is_too_large(name, value) else value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """Read an integer above 0, or None for null; an absent field has the default."""
        value = self._get(name, default, int, "an integer or null", nullable=True)
        if value is not None and value < 1:
            self.refuse(f"{name}={quoted(value)} is below 1")
            return 1
        return 1 if value is not None and self._is_too_large(name, value) else value

    def _is_too_large(self, name: str, value: int) -> bool:
        most = _LARGEST_OF.get(name, _LARGEST)
        if value > most:
            self.refuse(f"{name}={quoted(value)} is above {most:,}, which no model has")
        return value > most

    def number(
        self, name: str, default: float, above: float | None = None, least: float | None = None
    ) -> float:
        """Read a finite number greater than `above`, or not below `least`."""
        value = self._get(name, default, (int, float), "a number")
        if not is_finite(value):
            self.refuse(f"{name}={quoted(value)} is not a finite number")
        elif above is not None and not value > above:
            self.refuse(f"{name}={value:g} is not above {above:g}")
        elif least is not None and value < least:
            self.refuse(f"{name}={value:g} is below {least:g}")
        else:
            return float(value)
        return float(default)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """Read a number above 0, or None for null; an absent field has the default."""
        value = self._get(name, default, (int, float), "a number or null", nullable=True)
        if value is None:
            return None
        if not is_finite(value):
            self.refuse(f"{name}={quoted(value)} is not a finite number; null turns it off")
            return default
        if not value > 0:
            self.refuse(f"{name}={value!r} is not above 0; null turns it off")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Read true or false."""
        return self._get(name, default, bool, "true or false")

    def choice(self, name: str, default: str, choices: Mapping[str, Any]) -> str:
        """Read a string that is one of `choices`."""
        value = self._get(name, default, str, "a string")
        if value not in choices:
            self.refuse(f"{name}={value!r} is not supported; these are: {', '.join(choices)}")
        return value

    def labels(self) -> tuple[str, ...]:
        """Read the labels of a classifier, in the order of its outputs."""
        self._seen |= {"id2label", "label2id", "num_labels"}
        count, named = self.content.get("num_labels"), self.content.get("id2label")
        if count is not None and named is not None and count != len(named):
            self.refuse(
                f"num_labels={count!r} and id2label with {len(named)} labels; leave one out"
            )
        if named is None:
            count = 2 if count is None else count
            if isinstance(count, int) and self._is_too_large("num_labels", count):
                count = 2
            named = {i: f"LABEL_{i}" for i in range(count)} if isinstance(count, int) else count
        numbers = {str(i) for i in range(len(named))} if isinstance(named, Mapping) else set()
        if not numbers or {*map(str, named)} != numbers:
            self.refuse(f"id2label={quoted(named)} must number the labels from 0")
            return ("0", "1")
        names = {int(number): str(name) for number, name in named.items()}
        return tuple(names[i] for i in range(len(names)))

    def only(self, name: str, *values: Any, why: str = "") -> None:
        """Refuse a field whose value is none of `values`, unless it is ignored."""
        self._seen.add(name)
        given = self.content.get(name, values[0])
        if given in values or name in self.ignore:
            return
        usual = " or ".join("null" if value is None else str(value) for value in values)
        reason = f" ({why})" if why else ""
        self.refuse(f"{name}={quoted(given)} is not supported, only {usual}{reason}")

    def inert(self, *names: str) -> None:
        """Accept fields that have no effect in this family."""
        self._seen |= {*names}

    def alias(self, other: str, name: str) -> None:
        """Accept `other` as another name of the field `name`."""
        self._seen.add(other)
        if other not in self.content:
            return
        if self.content.get(name, self.content[other]) != self.content[other]:
            self.refuse(
                f"{other}={self.content[other]!r} and {name}={self.content[name]!r} are two values "
                "of one field; leave one out"
            )
        self.content = {**self.content, name: self.content[other]}

    def layer_types(
        self, layers: int, usual: Callable[[int], bool], read: bool = True
    ) -> tuple[str, ...]:
        """Read the kind of attention of each layer. If `layer_types` is absent, or not read in this
        family (`read` is false), `usual(layer)` is True for layers with a window.
        """
        self._seen.add("layer_types")
        given = self.content.get("layer_types")
        found = tuple(SLIDING if usual(layer) else FULL for layer in range(layers))
        if given is None:
            return found
        known = isinstance(given, list) and len(given) == layers
        if not known or (read and not all(kind in (FULL, SLIDING) for kind in given)):
            self.refuse(
                f"layer_types={quoted(given)} must name {FULL} or {SLIDING} for each of {layers} "
                "layers"
            )
            return (FULL,) * layers
        if read:
            return tuple(given)
        if tuple(given) != found:
            self.notes.append(
                f"config.json: layer_types is not read for model_type={self.model_type!r}, as in "
                f"transformers; the layers have {' and '.join(sorted({*found}))}"
            )
        return found

    def take_kinds(self, usual: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
        """Read the kind of each layer from `layer_types`, `usual` if it is absent, for a family
        whose layers differ in more than their attention. `layer_types` of this reader then reads
        nothing: all layers with attention are alike.
        """
        self._seen.add("layer_types")
        given = self.content.get("layer_types")
        self.content = {name: x for name, x in self.content.items() if name != "layer_types"}
        if given is None:
            return tuple(usual)
        valid = isinstance(given, list) and len(given) == len(usual)
        if not valid or not all(kind in known for kind in given):
            self.refuse(
                f"layer_types={quoted(given)} must name {' or '.join(known)} for each of "
                f"{len(usual)} layers"
            )
            return tuple(usual)
        return tuple(given)

    def overrides(
        self, layers: Sequence[int], count: int, known: Sequence[str]
    ) -> dict[str, int] | None:
        """Read `per_layer_config`: fields of `layers`, out of `count`, that differ from those of
        other layers. They must be the same in all of them, and among `known`. None if it is absent.
        """
        given = self._get("per_layer_config", None, dict, "a mapping or null", nullable=True)
        if given is None:
            return None
        given = {str(key).lstrip("0") or "0": value for key, value in given.items()}  # "05" of 12
        own = {str(layer): given.get(str(layer)) or {} for layer in range(count)}
        unknown = given.keys() - own.keys()
        one = own[str(layers[0])] if layers else {}
        alike = all(own[str(i)] == (one if i in layers else {}) for i in range(count))
        numbers = isinstance(one, Mapping) and all(
            name in known and isinstance(value, int) and value > 0 for name, value in one.items()
        )
        if unknown or not alike or not numbers:
            self.refuse(
                f"per_layer_config={quoted(given)} is not supported: only {' and '.join(known)}, "
                f"the same in all layers with {FULL}"
            )
            return None
        return dict(one)

    def indices(self, name: str, usual: Collection[int]) -> Collection[int]:
        """Read a list of numbers of layers; null or absent means `usual`."""
        value = self._get(name, None, list, "a list of layers or null", nullable=True)
        if value is None:
            return usual
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            self.refuse(f"{name}={quoted(value)} is not a list of layers")
            return usual
        return value

    def finish(self) -> None:
        """Raise a `UserError` with all fields that are mistyped, unsupported or unknown."""
        left_out: list[str] = []
        for inner in self._inner:
            self._skip_copies(inner)
        for reader in (self, *self._inner):
            left_out += reader._check_rest()
        if left_out:
            self.notes.append(
                f"config.json asks for noise in training, which is left out: {', '.join(left_out)}"
                "; dropout of adapters is adapter.dropout"
            )
        raise_all(self._problems)

    def _skip_copies(self, inner: "ConfigReader") -> None:
        """Accept fields of an inner mapping next to it: transformers 4 wrote some, and reads none.
        A note names those with another value.
        """
        given = self.content.get(inner._within)
        if not isinstance(given, Mapping):
            return
        outside = (inner._seen & self.content.keys()) - self._seen - {"model_type"}
        apart = [name for name in sorted(outside) if self.content[name] != given.get(name)]
        self._seen |= outside
        if apart:
            self.notes.append(
                f"config.json: fields outside of {inner._within} that transformers does not read "
                f"there either, with other values: {', '.join(apart)}"
            )

    def _check_rest(self) -> list[str]:
        """Refuse fields that nobody read, and return those that ask for noise in training."""
        left_out = []
        for name, value in self.content.items():
            if name in self._seen or name in HARMLESS or name in self.ignore:
                continue
            if name in TRAINING:
                if not (value is None or (is_finite(value) and 0 <= value <= 1)):
                    self.refuse(f"{name}={quoted(value)} is not a number from 0 to 1, or null")
                left_out += [f"{name}={value!r}"] if value else []
            elif name in RESTRICTED:
                values, why = RESTRICTED[name]
                self.only(name, *values, why=why)
            elif name in QUANTIZED:
                self._refuse_quantized(name, value)
            elif value:
                self.refuse(
                    f"{name}={quoted(value)} is not understood for model_type="
                    f"{self.model_type!r} and may change results; if it does not, set "
                    f"ignore_config_fields=[{name}] (--ignore-config-fields {name} of generate and "
                    "combine)"
                )
        return left_out

    def _refuse_quantized(self, name: str, value: Any) -> None:
        if not value:
            return
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        self.refuse(
            f"{name}={quoted(method or value)}: the weights are quantised in a way that is not "
            f"read for model_type={self.model_type!r}; give the model that they were made from "
            "(base_dtype=nf4 or int8 quantises it here), or one in FP8, bitsandbytes or GGUF"
        )
