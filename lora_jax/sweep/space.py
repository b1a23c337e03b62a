"""Space of a sweep: the file of `lora-jax sweep --space`, and the trials that it describes.

sampler: grid | random | tpe
trials: 20                       # of a grid: all points
halving: {first_step: 25, factor: 2}
space:
  adapter.rank: [1, 4, 16]
  train.learning_rate: {low: 1e-4, high: 3e-3, log: true}
  seed: [0, 1, 2]
  tenant:                        # settings that go together
    - {data.train: a.jsonl, data.eval: a-eval.jsonl}
    - {data.train: b.jsonl, data.eval: b-eval.jsonl}
"""

import dataclasses
import itertools
import math
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_jax import config as configs
from lora_jax.config import Config, document, read_text
from lora_jax.config.text import exists, quoted, shown
from lora_jax.config.types import as_setting, convert, is_null
from lora_jax.errors import UserError, nearest, raise_all

SAMPLERS = ("grid", "random", "tpe")
_SECTIONS = ("adapter", "train", "objective", "data")
_KEYS = ("sampler", "trials", "halving", "space")
_MOST = 10_000  # trials

Settings = dict[str, Any]  # by dotted key


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly, or with `log` evenly by their logarithm."""

    field: str
    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, generator: random.Random) -> Settings:
        """Return a random value."""
        if self.whole and not self.log:
            return {self.field: generator.randint(int(self.low), int(self.high))}
        if not self.log:
            return {self.field: generator.uniform(self.low, self.high)}
        value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        value = min(max(value, self.low), self.high)
        return {self.field: round(value) if self.whole else value}


@dataclass(frozen=True)
class Choices:
    """Settings of which a trial takes one entry; an entry has one value, or several together."""

    name: str
    entries: tuple[Settings, ...]

    def draw(self, generator: random.Random) -> Settings:
        """Return a random entry."""
        return generator.choice(self.entries)


Axis = Range | Choices


@dataclass(frozen=True)
class Halving:
    """Stop the worse members at steps that grow by `factor`; one of `factor` goes on.

    first_step: step of the first comparison
    """

    first_step: int
    factor: int = 2


@dataclass(frozen=True)
class Space:
    """A parsed space file."""

    axes: tuple[Axis, ...]
    sampler: str = "grid"
    trials: int | None = None
    halving: Halving | None = None
    source: str = "space"

    @property
    def points(self) -> int | None:
        """Number of different trials; None for a space with a range."""
        sizes = [len(one.entries) for one in self.axes if isinstance(one, Choices)]
        return math.prod(sizes) if len(sizes) == len(self.axes) else None

    @property
    def fields(self) -> list[str]:
        """Settings that differ between trials."""
        found = [
            [one.field] if isinstance(one, Range) else list(one.entries[0]) for one in self.axes
        ]
        return list(dict.fromkeys(itertools.chain(*found)))


@dataclass(frozen=True)
class Trial:
    """A member of a sweep: its settings and the whole config that follows from them."""

    number: int
    settings: Settings
    config: Config = field(repr=False)


def load_space(path: str | Path) -> Space:
    """Read a space file.

    Raises:
        UserError: the file is missing or no mapping; unknown keys or settings; values of a wrong
            type; an empty list; values that are there twice; a sampler that cannot draw them.
    """
    path = Path(path)
    if not exists(path, f"space file {path}"):
        raise UserError(f"space file {shown(path)} does not exist")
    content = document.read(read_text(path, f"space file {path}"), str(path))
    return parse_space(content, str(path))


def parse_space(content: Any, source: str = "space") -> Space:
    """Return the space of a mapping; as `load_space`."""
    if not isinstance(content, Mapping):
        raise UserError(f"{source} must be a mapping with {', '.join(_KEYS)}")
    problems = [
        f"{source}: unknown key {quoted(key)}; it has: {', '.join(_KEYS)}.{nearest(key, _KEYS)}"
        for key in map(str, content)
        if key not in _KEYS
    ]
    axes: list[Axis] = []
    given = content.get("space")
    if not isinstance(given, Mapping) or not given:
        problems.append(f"{source}: space must be a mapping of settings to their values")
        given = {}
    for name, values in given.items():
        try:
            axes.append(_axis(str(name), values))
        except UserError as error:
            problems += [f"{source}: {line}" for line in str(error).splitlines()]
    sampler = str(content.get("sampler", "grid"))
    trials = _whole(content.get("trials"), "trials", source, problems)
    halving = _halving(content.get("halving"), source, problems)
    raise_all(problems)
    space = Space(tuple(axes), sampler, trials, halving, source)
    raise_all([f"{source}: {problem}" for problem in _space_problems(space)])
    return space


def _whole(value: Any, name: str, source: str, problems: list[str]) -> int | None:
    if value is None or is_null(value):
        return None
    try:
        found = convert(value, int)
    except ValueError as error:
        problems.append(f"{source}: {name}={as_setting(value)} {error}")
        return None
    if not 1 <= found <= _MOST:
        problems.append(f"{source}: {name}={found} must be from 1 to {_MOST:,}")
    return found


def _halving(value: Any, source: str, problems: list[str]) -> Halving | None:
    if value is None or is_null(value):
        return None
    names = [one.name for one in dataclasses.fields(Halving)]
    if not isinstance(value, Mapping) or "first_step" not in value or set(value) - set(names):
        problems.append(f"{source}: halving must be a mapping as {{first_step: 25, factor: 2}}")
        return None
    numbers = {
        str(key): _whole(one, f"halving.{key}", source, problems) for key, one in value.items()
    }
    found = Halving(**{key: one or 1 for key, one in numbers.items()})
    if found.factor < 2:
        problems.append(f"{source}: halving.factor={found.factor} must be at least 2")
    return found


def _space_problems(space: Space) -> Iterator[str]:
    if space.sampler not in SAMPLERS:
        hint = nearest(space.sampler, SAMPLERS)
        yield f"sampler={space.sampler!r} is none of {', '.join(SAMPLERS)}.{hint}"
        return
    names = [
        name
        for axis in space.axes
        for name in ([axis.field] if isinstance(axis, Range) else axis.entries[0])
    ]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} has values in two places; give it once"
    points, trials = space.points, space.trials
    if space.sampler == "grid":
        ranges = [axis.field for axis in space.axes if isinstance(axis, Range)]
        if ranges:
            yield (
                f"sampler=grid needs a list of values for {', '.join(ranges)}; a range is for "
                "sampler=random or tpe"
            )
        elif trials is not None and points is not None and trials < points:
            yield (
                f"trials={trials}, and the grid has {points} points; leave trials out, or take "
                "sampler=random"
            )
        elif points is not None and points > _MOST:
            yield f"the grid has {points:,} points; at most {_MOST:,} are supported"
        return
    if trials is None:
        yield f"sampler={space.sampler} needs the number of trials, as in trials: 20"
    elif space.sampler == "random" and points is not None and trials > points:
        yield (
            f"trials={trials}, and the space has {points} different ones: there would be duplicate "
            f"trials; set trials to {points}, or take sampler=grid"
        )


def _axis(name: str, values: Any) -> Axis:
    known = _fields()
    if isinstance(values, list) and values and all(isinstance(one, Mapping) for one in values):
        if name not in known:
            return _together(name, values)
    _check_field(name)
    kind = known[name]
    if isinstance(values, Mapping):
        return _range(name, values, kind)
    if not isinstance(values, list):
        raise UserError(
            f"{name}={as_setting(values)} must be a list of values, or a range as {{low: 1e-4, "
            "high: 1e-2, log: true}"
        )
    if not values:
        raise UserError(f"{name}=[] leaves no trial: give at least one value")
    entries = tuple({name: _value(name, one, kind)} for one in values)
    _check_twice(name, entries)
    return Choices(name, entries)


def _together(name: str, values: Sequence[Mapping[Any, Any]]) -> Choices:
    """Return the axis of an own name, whose entries set several settings together."""
    known, entries = _fields(), []
    for one in values:
        for key in map(str, one):
            _check_field(key)
        entries.append(
            {str(key): _value(str(key), value, known[key]) for key, value in one.items()}
        )
    if any(set(entry) != set(entries[0]) for entry in entries):
        raise UserError(f"{name}: every entry must set the same settings as the first")
    if not entries[0]:
        raise UserError(f"{name}: the entries set nothing; write them as {{data.train: a.jsonl}}")
    _check_twice(name, entries)
    return Choices(name, tuple(entries))


def _check_twice(name: str, entries: Sequence[Settings]) -> None:
    seen: list[Settings] = []
    for entry in entries:
        if entry in seen:
            value = next(iter(entry.values())) if len(entry) == 1 else entry
            raise UserError(
                f"{name} has {as_setting(value)} twice, which makes duplicate trials; give it once"
            )
        seen.append(entry)


def _range(name: str, values: Mapping, kind: Any) -> Range:
    keys = ("low", "high", "log")
    kinds = typing.get_args(kind) or (kind,)
    if not {int, float} & set(kinds):
        raise UserError(f"{name} is no number: give a list of values")
    if set(values) - set(keys) or not {"low", "high"} <= set(values):
        raise UserError(f"{name}: a range has low, high and log, as {{low: 1e-4, high: 1e-2}}")
    try:
        low, high = (float(convert(values[key], float)) for key in ("low", "high"))
        log = convert(values.get("log", False), bool)
    except ValueError as error:
        raise UserError(f"{name}: low, high or log {error}") from error
    if not low < high or (log and low <= 0):
        need = "0 < low < high" if log else "low < high"
        raise UserError(f"{name}: low={low:g} and high={high:g}; a range needs {need}")
    return Range(name, low, high, log, float not in kinds)


def _value(name: str, value: Any, kind: Any) -> Any:
    try:
        return convert(value, kind)
    except ValueError as error:
        raise UserError(f"{name}={as_setting(value)} {error}") from error


def _check_field(name: str) -> None:
    known = _fields()
    if name in known and (name == "seed" or name.partition(".")[0] in _SECTIONS):
        return
    if name in known:
        raise UserError(
            f"{name} is the same for all trials: set it in the config. Trials differ in settings "
            f"of {', '.join(_SECTIONS)}, and in seed"
        )
    short = [key for key in known if key.rpartition(".")[2] == name]
    hint = f" Did you mean {short[0]!r}?" if short else nearest(name, known)
    raise UserError(
        f"unknown setting {quoted(name)}; a trial sets fields of {', '.join(_SECTIONS)}, such as "
        f"adapter.rank, or seed.{hint}"
    )


def _fields() -> dict[str, Any]:
    """Return the types of all settings by dotted key."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(Config):
        if dataclasses.is_dataclass(one.type):
            for inner in dataclasses.fields(typing.cast(type, one.type)):
                found[f"{one.name}.{inner.name}"] = inner.type
        else:
            found[one.name] = one.type
    return found


def grid(space: Space) -> Iterator[Settings]:
    """Yield every point of a grid, the last axis fastest."""
    entries = [axis.entries for axis in space.axes if isinstance(axis, Choices)]
    for chosen in itertools.product(*entries):
        yield {key: value for one in chosen for key, value in one.items()}


def draws(space: Space, seed: int) -> Iterator[Settings]:
    """Yield `space.trials` different random points, the same for every seed."""
    generator, seen, misses = random.Random(seed), set(), 0
    while len(seen) < (space.trials or 0):
        point = {key: value for axis in space.axes for key, value in axis.draw(generator).items()}
        misses += repr(point) in seen
        if misses > _MOST:
            raise UserError(
                f"{space.source}: trials={space.trials}, and only {len(seen)} different ones were "
                "drawn: the rest would be duplicate trials; lower trials"
            )
        if repr(point) not in seen:
            seen.add(repr(point))
            yield point


def make_trial(base: Config, number: int, settings: Settings) -> Trial:
    """Return a trial: the config of the sweep with some settings replaced.

    Raises:
        UserError: as `config.parse`, with the number of the trial.
    """
    content = yaml.safe_load(configs.dump(base))
    for key, value in settings.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[name] = value
    if settings.get("train.epochs") is not None:
        content["train"]["steps"] = None
    elif settings.get("train.steps") is not None:
        content["train"]["epochs"] = None
    try:
        return Trial(number, settings, configs.parse(content, source=f"trial {number}"))
    except UserError as error:
        own = f"trial {number}: "
        lines = (own + line.removeprefix(own) for line in str(error).splitlines())
        raise UserError("\n".join(lines)) from error
