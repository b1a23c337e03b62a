"""Rotary settings of config.json by layer type, as transformers reads them: the mapping
`rope_parameters`, or `rope_theta` and `rope_scaling` in older files.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.models.reader import FULL, SLIDING, ConfigReader
from lora_jax.nn import rope

# Fields in the files of the authors of YaRN, which transformers does not read.
_UNREAD = ("attn_factor", "finetuned")
_KINDS = (FULL, SLIDING)


@dataclass(frozen=True)
class RopeRules:
    """Defaults and supported values of a family's rotary settings."""

    theta: float = 10000.0  # default of rope_theta
    # Field with the theta of sliding layers, if there is one, and its default, if these layers have
    # settings of their own.
    local: tuple[str | None, float] | None = None
    types: Container[str] = rope.USUAL  # supported values of rope_type
    partial: bool = False  # reads partial_rotary_factor
    share: float = 1  # default of partial_rotary_factor
    original: int | None = None  # default of original_max_position_embeddings


PLAIN_ROPE = RopeRules()


def read_rope(
    reader: ConfigReader, max_positions: int, head_dim: int, rules: RopeRules
) -> dict[str, dict[str, Any]]:
    """Read the rotary settings of full and of sliding layers, by layer type."""
    content = reader.content
    reader.inert("rope_theta", "rope_scaling", "rope_parameters", rope.ORIGINAL)
    if rules.partial or content.get("partial_rotary_factor") == 1:
        reader.inert("partial_rotary_factor")
    usual = {"rope_theta": reader.number("rope_theta", rules.theta)}
    if rules.partial:
        usual["partial_rotary_factor"] = reader.number("partial_rotary_factor", rules.share)
    scaling, parameters = (_mapping(reader, name) for name in ("rope_scaling", "rope_parameters"))
    one = _Reader(reader, max_positions, head_dim, rules)
    if rules.local is None:
        one.original = content.get(rope.ORIGINAL) or rules.original
        return _for_all_layers(one, usual, scaling, parameters)
    name, local = rules.local
    local = local if name is None else reader.number(name, local)
    own = {FULL: usual, SLIDING: {"rope_theta": local}}
    return _by_layer_type(one, own, scaling, parameters)


def _mapping(reader: ConfigReader, name: str) -> dict[str, Any]:
    """Return a mapping of config.json without the fields that are ignored."""
    value = reader.content.get(name) or {}
    if name in reader.ignore:
        return {}
    if not isinstance(value, Mapping):
        reader.refuse(f"{name}={value!r} is not a mapping")
        return {}
    found = {}
    for key, item in value.items():
        if f"{name}.{key}" in reader.ignore:
            continue
        if key in _KINDS and isinstance(item, Mapping):
            item = {k: v for k, v in item.items() if f"{name}.{key}.{k}" not in reader.ignore}
        found[key] = item
    return found


def _for_all_layers(
    one: "_Reader", usual: dict[str, Any], scaling: dict[str, Any], parameters: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return one mapping for all layers: rope_scaling if given, else rope_parameters."""
    for name, mapping in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if kinds := [kind for kind in _KINDS if kind in mapping]:
            one.reader.refuse(
                f"{name} by layer type ({', '.join(kinds)}) is not read for "
                f"model_type={one.reader.model_type!r}; give one mapping for all layers"
            )
            return {kind: usual | {"rope_type": "default"} for kind in _KINDS}
    if scaling and parameters:
        one.refuse_contradiction(usual | scaling, usual | parameters)
    given, name = (scaling, "rope_scaling") if scaling else (parameters, "rope_parameters")
    settings = one.read(usual | given, dict.fromkeys(given, name))
    return dict.fromkeys(_KINDS, settings)


def _by_layer_type(
    one: "_Reader",
    own: dict[str, dict[str, Any]],
    scaling: dict[str, Any],
    parameters: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return a mapping per layer type, from rope_parameters; rope_scaling is for full layers."""
    refuse = one.reader.refuse
    nested = {kind: parameters.pop(kind) or {} for kind in _KINDS if kind in parameters}
    for kind, values in nested.items():
        if not isinstance(values, Mapping):
            refuse(f"rope of {kind}={values!r} is not a mapping")
            nested[kind] = {}
    if nested and parameters:
        refuse(f"rope_parameters mix layer types and {list(parameters)}")
    elif one.settled(own[FULL] | parameters) != one.settled(own[FULL]):
        refuse(
            f"rope_parameters={parameters} are read by layer type for "
            f"model_type={one.reader.model_type!r}; write them under {FULL} and {SLIDING}"
        )
    full, sliding = (own[kind] | nested.get(kind, {}) for kind in _KINDS)
    if "type" in scaling and scaling["type"] != scaling.get("rope_type", "default"):
        refuse(
            f"rope_scaling.type={scaling['type']!r} is not read for "
            f"model_type={one.reader.model_type!r}; write rope_type"
        )
    if not all(values.get("truncate", True) for values in (full | scaling, sliding)):
        refuse("truncate of yarn is not read by layer type: it is true there; leave it out")
    if scaling and nested.get(FULL):
        one.refuse_contradiction(full | scaling, full)
    names = {
        kind: dict.fromkeys(nested.get(kind, {}), f"rope_parameters.{kind}") for kind in _KINDS
    }
    names[FULL] |= dict.fromkeys(scaling, "rope_scaling")
    return {
        FULL: one.read(full | scaling, names[FULL]),
        SLIDING: one.read(sliding, names[SLIDING]),
    }


class _Reader:
    """Reader of one mapping of rotary settings."""

    def __init__(self, reader: ConfigReader, max_positions: int, head_dim: int, rules: RopeRules):
        self.reader, self.max_positions, self.head_dim = reader, max_positions, head_dim
        self.types, self.partial = rules.types, rules.partial
        self.original: int | None = (
            None  # from a field outside of the mapping, which takes precedence
        )

    def settled(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that have an effect, with those filled in that follow from others."""
        found = {key: value for key, value in given.items() if value is not None}
        found = {key: value for key, value in found.items() if key not in _UNREAD}
        kind = found.setdefault("rope_type", found.get("type", "default"))
        found.pop("type", None)  # its name before transformers 4.43
        if kind in ("su", "yarn") and "longrope" in self.types and "yarn" not in self.types:
            kind = found["rope_type"] = "longrope"  # Phi-3's first names for it
        if not self.partial and found.get("partial_rotary_factor") == 1:
            del found["partial_rotary_factor"]
        if kind in ("llama3", "yarn", "longrope"):
            inside = found.get(rope.ORIGINAL)
            found[rope.ORIGINAL] = self.original or inside or self.max_positions
        if kind == "yarn" and "truncate" in given:
            found.setdefault("truncate", False)  # transformers tests it, and null is false
        if kind == "yarn" and "factor" in given and given["factor"] is None:
            found["factor"] = self.max_positions / found[rope.ORIGINAL]
        return found

    def refuse_contradiction(self, scaling: Mapping[str, Any], parameters: Mapping[str, Any]):
        """Refuse rope_scaling and rope_parameters with different effects."""
        first, second = self.settled(scaling), self.settled(parameters)
        apart = [
            f"{name} ({first.get(name)} and {second.get(name)})"
            for name in sorted({*first, *second}, key=str)
            if first.get(name) != second.get(name)
        ]
        if apart:
            self.reader.refuse(
                f"rope_scaling and rope_parameters contradict each other in {', '.join(apart)}; "
                "transformers reads rope_scaling: leave one out, or name the wrong one in "
                "ignore_config_fields"
            )

    def read(self, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """Check the values and return the settings; `names` has the mapping of each field."""
        refuse = self.reader.refuse
        found = self.settled(given)
        kind = found["rope_type"]
        if kind not in self.types or kind not in rope.FIELDS:
            known = [name for name in rope.FIELDS if name in self.types]
            refuse(f"rope_type={kind!r} is not supported; these are: {', '.join(known)}")
            return found
        needed, optional = rope.FIELDS[kind]
        if missing := [name for name in needed if name not in found]:
            refuse(f"rope_type={kind!r} needs {', '.join(missing)}")
        known = {"rope_theta", "rope_type", rope.ORIGINAL, *needed, *optional}
        known |= {"partial_rotary_factor"} if self.partial else set()
        if unknown := sorted({*found} - known):
            paths = [f"{names.get(name, 'rope_parameters')}.{name}" for name in unknown]
            refuse(
                f"not understood for rope_type={kind!r}: {', '.join(unknown)}; if they do not "
                f"change results, set ignore_config_fields=[{', '.join(paths)}]"
            )
        for name in _UNREAD:
            if given.get(name) not in (None, 1):
                self.reader.notes.append(
                    f"config.json: {names[name]}.{name}={given[name]!r} is not read, as in "
                    "transformers"
                )
        for problem in rope.problems(
            self.head_dim, {name: value for name, value in found.items() if name in known}
        ):
            refuse(problem)
        if kind in ("dynamic", "longrope"):
            found["max_position_embeddings"] = self.max_positions
        return found
