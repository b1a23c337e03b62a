"""Rules of settings: what is known of each in addition to its type and default.

    rank: int = option(8, at_least=1, at_most=10**6)
    options_of(AdapterConfig)["rank"].at_least       # 1

A rule is metadata of the field. Whatever treats all settings alike reads it: the checks of values,
the comparison with a checkpoint, the key of the token cache, `adapter.path`, docs/configuration.md.
"""

import copy
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_jax.config.types import as_setting, describe, fits
from lora_jax.errors import nearest

LARGEST_SEED = 2**63 - 1  # that JAX takes
_METADATA = "option"
_LARGE = 10**6  # bounds from here on are for slips of the hand, floats are written as 1e+06


@dataclass(frozen=True)
class Option:
    """The rule of a setting. None means not set, and satisfies every rule.

    choices: the allowed values, or allowed items of a list; empty: any
    at_least, at_most, above, below: bounds of a number, with and without the bound itself
    hint: the end of an error about the value, if no choice is close to it
    is_path: the name of a file or a directory
    resumable: a resumed run may have another value than its checkpoint, because the remaining
        steps compute the same; True for a section holds for all of its settings
    changes_encoding: the value is part of the key of cached tokens; every setting of `data` says
        so or says that it is not
    with_path: goes with `adapter.path`: a setting of the training, which adapter files do not have
    methods: the only values of `adapter.method` that read the setting; empty: all of them
    inits: the only values of `adapter.init` that read it; empty: all of them
    objectives: the only values of `train.objective` that read it; empty: all of them
    """

    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""
    is_path: bool = False
    resumable: bool = False
    changes_encoding: bool | None = None
    with_path: bool = False
    methods: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("choices", "methods", "inits", "objectives"):
            if not isinstance(getattr(self, name), tuple):  # ("lora") is a text
                raise TypeError(f"{name} must be a tuple, not {getattr(self, name)!r}")

    def problem(self, name: str, value: Any, spec: str = "") -> str | None:
        """Return the error of a value, which begins with `name`, or None. Bounds are written with
        the format `spec`.
        """
        if value is None:
            return None
        if self.choices:
            return self._choice_problem(name, value)
        bounds = self._broken(value, spec)
        if not bounds:
            return None
        hint = self.hint and f"; {self.hint}"
        return f"{name}={_written(value)} must be {bounds}{hint}"

    def _choice_problem(self, name: str, value: Any) -> str | None:
        is_list = isinstance(value, list | tuple)
        wrong = [one for one in (value if is_list else [value]) if one not in self.choices]
        if not wrong:
            return None
        names = [one if isinstance(one, str) else as_setting(one) for one in self.choices]
        given = f"{name}: {wrong[0]!r}" if is_list else f"{name}={wrong[0]!r}"
        hint = nearest(str(wrong[0]), names) or (self.hint and f" {self.hint}")
        return f"{given} is not one of: {', '.join(names)}.{hint}"

    def _broken(self, value: Any, spec: str) -> str:
        """Return the bound that a number breaks; for a share, both bounds."""
        low, high = self._lower(spec), self._upper(spec)
        upper = self.at_most if self.below is None else self.below
        too_small = (self.at_least is not None and not value >= self.at_least) or (
            self.above is not None and not value > self.above
        )
        too_large = (self.at_most is not None and not value <= self.at_most) or (
            self.below is not None and not value < self.below
        )
        if (too_small or too_large) and upper is not None and upper <= 1:
            return f"{low} and {high}"
        return low if too_small else high if too_large else ""

    def _lower(self, spec: str) -> str:
        if self.above is not None:
            return f"above {self.above:{spec}}"
        return "" if self.at_least is None else f"at least {self.at_least:{spec}}"

    def _upper(self, spec: str) -> str:
        if self.below is not None:
            return f"below {self.below:{spec}}"
        return "" if self.at_most is None else f"at most {self.at_most:{spec}}"

    def values(self) -> str:
        """Return the allowed values, for the documentation; empty if any is. Bounds that only catch
        typing errors are left out.
        """
        if self.choices:
            names = [one if isinstance(one, str) else as_setting(one) for one in self.choices]
            return ", ".join(f"`{name}`" for name in names)
        high = "" if self.at_most is not None and self.at_most >= _LARGE else self._upper(",")
        return " and ".join(filter(None, (self._lower(","), high)))


def option(default: Any, **rule: Any) -> Any:
    """Return a dataclass field with a default and the rule `Option(**rule)`.

    Raises:
        TypeError: `Option` has no such field.
    """
    metadata = {_METADATA: Option(**rule)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, **rule: Any) -> Any:
    """Return a dataclass field for a section: a dataclass of settings, all by default."""
    return dataclasses.field(default_factory=kind, metadata={_METADATA: Option(**rule)})


def options_of(kind: Any) -> dict[str, Option]:
    """Return the rules of a dataclass of settings by dotted key, in its order."""
    return dict(_options(kind, "", False))


def _options(kind: Any, prefix: str, resumable: bool) -> Iterator[tuple[str, Option]]:
    for f in dataclasses.fields(kind):
        rule = f.metadata.get(_METADATA, Option())
        rule = dataclasses.replace(rule, resumable=rule.resumable or resumable)
        if dataclasses.is_dataclass(f.type):
            yield from _options(f.type, f"{prefix}{f.name}.", rule.resumable)
        else:
            yield prefix + f.name, rule


def encoding_keys(kind: Any) -> tuple[str, ...]:
    """Return the settings of a section that are part of the key of cached tokens.

    Raises:
        TypeError: a setting does not say whether it is.
    """
    rules = options_of(kind)
    if silent := [name for name, rule in rules.items() if rule.changes_encoding is None]:
        raise TypeError(f"{kind.__name__}: state changes_encoding of {', '.join(silent)}")
    return tuple(name for name, rule in rules.items() if rule.changes_encoding)


def type_problems(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the settings of a section, and of sections in it, whose values have another type."""
    for f in dataclasses.fields(values):
        value, name = getattr(values, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(f.type):
            kind = typing.cast(type, f.type)
            if isinstance(value, kind):
                yield from type_problems(value, f"{name}.")
            else:
                yield f"{name}={as_setting(value)} is not {kind.__name__}(..)"
        elif not fits(value, f.type):
            yield f"{name}={as_setting(value)} is not {describe(f.type)}"


def _written(value: Any) -> str:
    if isinstance(value, float) and value >= _LARGE:
        return f"{value:g}"
    return as_setting(value)
