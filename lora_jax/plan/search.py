"""Search over other settings of a run: those that fit, and those that are faster."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax import sharding
from lora_jax.config import Config, MeshConfig
from lora_jax.errors import UserError
from lora_jax.models.common import Model, attention_heads
from lora_jax.plan.analytic import estimate
from lora_jax.plan.chips import Chip
from lora_jax.plan.program import Program, build, stored
from lora_jax.plan.roofline import find_bounds

REMAT = ("none", "dots", "full")


@dataclass(frozen=True)
class Candidate:
    """Changed settings, as overrides, with the estimate from shapes."""

    overrides: tuple[str, ...]  # key.sub=value
    total: int  # bytes on each device
    seconds: float | None  # least time of a step; None without a chip


def find_best(
    config: Config, model: Model, devices: int, platform: str, chip: Chip | None, hbm: int | None
) -> list[Candidate]:
    """Return all meshes, micro-batches and remat policies that fit `hbm`, the fastest first;
    without a chip, the smallest first.
    """
    found = []
    for mesh in _meshes(devices):
        pieces = list(_pieces(config.train.batch_size, mesh.data * mesh.fsdp))
        if not pieces:
            continue
        program = _build(_with(config, mesh=mesh, micro_batch_size=pieces[0]), model, devices)
        for micro, remat in itertools.product(pieces, REMAT):
            given = _with(config, mesh=mesh, micro_batch_size=micro, remat=remat)
            one = _measure(dataclasses.replace(program, config=given), platform, chip, config)
            if hbm is None or one.total <= hbm:
                found.append(one)
    # Of those that are as fast, the one that leaves most room.
    return sorted(found, key=lambda one: (round(one.seconds or 0, 4), one.total))


def remedies(
    config: Config, model: Model, devices: int, platform: str, hbm: int
) -> list[Candidate]:
    """Return changes that need less memory: the best value of each single setting and, if none of
    these fits `hbm`, a combination of settings, the cheapest ones first, until it fits.
    """

    def measure(given: Config) -> Candidate | None:
        try:
            return _measure(_build(given, model, devices), platform, None, config)
        except UserError:  # a run would refuse it
            return None

    def best(given: Config, changes: Sequence[dict[str, Any]]) -> tuple[Config, Candidate] | None:
        options = [(new, measure(new)) for new in (_with(given, **change) for change in changes)]
        valid = [(new, one) for new, one in options if one is not None]
        return min(valid, key=lambda pair: pair[1].total, default=None)

    now = measure(config)
    least = now.total if now is not None else float("inf")
    single, given = [], config
    for changes in _changes(config, model, devices):
        alone, joined = best(config, changes), best(given, changes)
        if alone is not None and now is not None and alone[1].total < now.total:
            single.append(alone[1])
        if least > hbm and joined is not None and joined[1].total < least:
            given, least = joined[0], joined[1].total
    together = measure(given)
    single.sort(key=lambda one: one.total)
    if together is None or together in single or any(one.total <= hbm for one in single):
        return single
    return [*single, together]


def _changes(config: Config, model: Model, devices: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the values of each setting that can be changed, cheapest setting first."""
    heads, length = attention_heads(model.config), config.data.max_length
    tensors = [n for n in _divisors(devices) if all(number % n == 0 for number, _ in heads)]
    yield [{"mesh": MeshConfig(1, devices // tensor, tensor)} for tensor in tensors]
    yield [{"micro_batch_size": rows} for rows in _divisors(config.train.batch_size)]
    yield [{"remat": "full"}]
    if config.base_dtype != "nf4" and not config.adapter.trains_everything:
        yield [{"base_dtype": "nf4"}]
    yield [{"max_length": max(2, length // 2)}, {"max_length": max(2, length // 4)}]


def _with(config: Config, **changes: Any) -> Config:
    """Return `config` with changed settings of `train`, mesh, base_dtype or max_length."""
    parts = {name: changes.pop(name) for name in ("mesh", "base_dtype") if name in changes}
    if "max_length" in changes:
        length = changes.pop("max_length")
        parts["data"] = dataclasses.replace(config.data, max_length=length)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes), **parts)


def _build(config: Config, model: Model, devices: int) -> Program:
    mesh = sharding.abstract_mesh(config.mesh, devices)
    return build(config, stored(config, model), mesh)


def _measure(program: Program, platform: str, chip: Chip | None, before: Config) -> Candidate:
    found = estimate(program, platform)
    seconds = None if chip is None else find_bounds(program, chip, found).seconds
    overrides = tuple(_differences(before, program.config))
    return Candidate(overrides, found.total, seconds)


def _differences(before: Config, after: Config) -> Iterator[str]:
    if before.mesh != after.mesh:
        sizes = dataclasses.asdict(after.mesh)
        yield from (f"mesh.{axis}={size}" for axis, size in sizes.items())
    for name in ("micro_batch_size", "remat"):
        value = getattr(after.train, name)
        if value != getattr(before.train, name):
            yield f"train.{name}={'null' if value is None else value}"
    if before.base_dtype != after.base_dtype:
        yield f"base_dtype={after.base_dtype}"
    if before.data.max_length != after.data.max_length:
        yield f"data.max_length={after.data.max_length}"


def _meshes(devices: int) -> Iterator[MeshConfig]:
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            yield MeshConfig(devices // tensor // fsdp, fsdp, tensor)


def _pieces(rows: int, parts: int) -> Iterator[int | None]:
    """Yield micro-batch sizes that `parts` divides; None for the whole batch."""
    for micro in _divisors(rows):
        if micro % parts == 0:
            yield None if micro == rows else micro


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
