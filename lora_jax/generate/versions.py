"""Published adapters, and which of them are in the slots of a bank.

A name refers to its newest version. A request keeps the version that it was submitted with until
it ends, also if the name is published again or withdrawn meanwhile. A version is loaded into a slot
when a request needs it, in place of the one that was not used for the longest time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import jax
import numpy as np

from lora_jax import adapters as methods
from lora_jax.adapters import Bank
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, nearest
from lora_jax.models.common import Model
from lora_jax.nn.virtual import Prefix, Prompt, Virtual
from lora_jax.sharding import gather_to_host
from lora_jax.targets import Trainable, as_trainable
from lora_jax.tree import check_same_structure, dotted, flatten


@dataclass(eq=False)
class Version:
    """One version of a named adapter, with its weights in host memory."""

    name: str
    identity: str  # digest of weights and config
    adapters: Mapping[str, Any]
    config: AdapterConfig | Trainable
    slot: int | None = None
    users: int = 0  # requests that are running on it
    used: int = 0  # when it was last acquired
    virtual: Virtual | None = None  # virtual tokens, padded, in place of updates of weights

    @property
    def is_alone(self) -> bool:
        """True for adapters that no weighted sum can have: DoRA's gain, and virtual tokens."""
        return self.places > 0 or _settings(self.config).use_dora

    @property
    def places(self) -> int:
        """Number of virtual tokens."""
        return 0 if self.virtual is None else _settings(self.config).num_virtual_tokens or 0


class Versions:
    """Published adapters over one bank, whose slot 0 is the base. Virtual tokens, of which there
    may be `most`, need no slot.
    """

    def __init__(self, model: Model, bank: Bank | None, most: int):
        self.bank, self.most = bank, most
        self._model = model
        self._current: dict[str, Version] = {}
        self._slots: dict[int, Version] = {}
        self._clock = 0

    def publish(
        self,
        name: str,
        adapters: Mapping[str, Any],
        config: AdapterConfig | Trainable,
        known_identity: str | None = None,
    ) -> Version:
        """Return a new version of `name`, with a copy of the adapters. The same weights and config
        as before give the version that exists.

        Raises:
            UserError: an engine without slots; adapters that the bank refuses.
        """
        virtual = None
        if _settings(config).trains_virtual_tokens:
            virtual = self._padded(name, adapters, config)
        elif self.bank is None:
            raise UserError(f"adapter {name!r}: the engine has no slots; give it a bank")
        else:
            self.bank.check(adapters, config)
        copy = jax.tree.map(gather_to_host, dict(adapters))
        own = known_identity or identity(copy, config)
        version = Version(name, own, copy, config, virtual=virtual)
        known = self._current.get(name)
        if known is not None and known.identity == version.identity:
            return known
        self._current[name] = version
        if virtual is None and (slot := self._free_slot()) is not None:
            self._load(version, slot)
        return version

    def _padded(self, name: str, adapters: Mapping, config: AdapterConfig | Trainable) -> Virtual:
        """Return virtual tokens padded to `most`, in host memory."""
        settings = _settings(config)
        if (problem := _virtual_problem(self._model, settings, self.most)) is not None:
            raise UserError(f"adapter {name!r}: {problem}")
        found = as_trainable(self._model.params, config)
        check_same_structure(adapters, found.shapes, "these adapters do not fit model and config")
        padding = (0, self.most - (settings.num_virtual_tokens or 0))

        def pad(x: Any) -> np.ndarray:
            return np.pad(gather_to_host(x), [*[(0, 0)] * (x.ndim - 2), padding, (0, 0)])

        return jax.tree.map(pad, methods.prefix(dict(adapters), found))

    def warm_up(self) -> None:
        """Compile the program that loads a version, if no version was loaded yet."""
        if self.bank is not None and not self._slots:
            self.bank = self.bank.clear(1)

    def kinds(self) -> list[Virtual]:
        """Return virtual tokens of zeros of each kind that can be published."""
        c = self._model.config
        shape = self._model.cache_shape
        first = shape.heads[0]
        sizes = (first.layers, self.most, first.kv_heads * first.head_dim)
        keys, values = (np.zeros(sizes, np.float32) for _ in range(2))
        prompt = Prompt(np.zeros((self.most, c.hidden_size), np.float32))
        least = AdapterConfig(method="prompt", num_virtual_tokens=1)
        if _virtual_problem(self._model, least, self.most) is not None:
            return []
        alike = not shape.states and len(shape.heads) == 1
        return [prompt, Prefix(keys, values)] if alike else [prompt]

    def withdraw(self, name: str) -> None:
        """Forget a name; its running requests go on.

        Raises:
            UserError: a name that is not published.
        """
        self.find(name)
        del self._current[name]

    def find(self, name: str) -> Version:
        """Return the newest version of a name.

        Raises:
            UserError: a name that is not published.
        """
        if name not in self._current:
            known = ", ".join(sorted(self._current)) or "none"
            hint = nearest(name, self._current)
            raise UserError(f"adapter {name!r} is not published; there are: {known}.{hint}")
        return self._current[name]

    def check_sum(self, weights: Mapping[str, float], most: int) -> None:
        """Check the weights of a sum of up to `most` adapters, by name.

        Raises:
            UserError: too many adapters; weights that are no finite numbers; an adapter of DoRA or
                of virtual tokens that is not alone, with weight 1; a name that is not published.
        """
        if len(weights) > most:
            raise UserError(
                f"{len(weights)} adapters in one request are more than max_terms={most}; open the "
                f"engine with max_terms={len(weights)} or more"
            )
        slots = 0 if self.bank is None else self.bank.slots - 1
        if len(weights) > max(slots, 1):
            raise UserError(
                f"{len(weights)} adapters in one request need as many slots; the bank has {slots} "
                "for adapters"
            )
        for name, weight in weights.items():
            version = self.find(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(f"adapter {name!r}: its weight {weight!r} is no number")
            if not isfinite(weight):
                raise UserError(f"adapter {name!r}: its weight {weight!r} is not finite")
            if version.is_alone and (len(weights) > 1 or weight != 1):
                what = "virtual tokens" if version.places else "a gain (DoRA)"
                raise UserError(
                    f"adapter {name!r} has {what} and no weighted sum; ask for it alone, with "
                    "weight 1"
                )

    @property
    def resident(self) -> set[str]:
        """Names of the versions that are in a slot and can be asked for."""
        names = self._current.items()
        return {name for name, version in [*names] if version.slot is not None}

    @property
    def names(self) -> list[str]:
        return sorted(self._current)

    def acquire(self, versions: list[Version]) -> list[int] | None:
        """Return the slots of versions, loaded if necessary, and count a user of each; None if not
        all of them can be in a slot now.
        """
        versions = [version for version in versions if version.virtual is None]
        absent = [version for version in versions if version.slot is None]
        kept = {version.slot for version in versions}
        slots = [slot for slot in self._by_age() if slot not in kept][: len(absent)]
        if len(slots) < len(absent):
            return None
        for version, slot in zip(absent, slots, strict=True):
            self._load(version, slot)
        self._clock += 1
        for version in versions:
            version.users += 1
            version.used = self._clock
        return [int(version.slot or 0) for version in versions] or [0]

    def release(self, versions: list[Version]) -> None:
        """Count a user less of each version."""
        for version in versions:
            version.users -= 1

    def _free_slot(self) -> int | None:
        """Return a slot that is empty, or holds a version that nobody can ask for any more."""
        for slot in self._by_age():
            held = self._slots.get(slot)
            if held is None or self._current.get(held.name) is not held:
                return slot
        return None

    def _by_age(self) -> list[int]:
        """Return the slots without users: empty ones, replaced versions, the least recent."""
        slots = range(1, 1 if self.bank is None else self.bank.slots)
        idle = [slot for slot in slots if slot not in self._slots or not self._slots[slot].users]

        def age(slot: int) -> tuple[bool, bool, int]:
            held = self._slots.get(slot)
            if held is None:
                return False, False, slot
            return True, self._current.get(held.name) is held, held.used

        return sorted(idle, key=age)

    def _load(self, version: Version, slot: int) -> None:
        assert self.bank is not None
        if (held := self._slots.pop(slot, None)) is not None:
            held.slot = None
        self.bank = self.bank.put(slot, version.adapters, version.config)
        self._slots[slot], version.slot = version, slot


def identity(adapters: Mapping[str, Any], config: AdapterConfig | Trainable) -> str:
    """Return the SHA-256 of the weights of adapters and of their settings."""
    settings = json.dumps(asdict(_settings(config)), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode())
    for path, leaf in sorted(flatten(adapters).items()):
        array = np.asarray(leaf)
        digest.update(f"{dotted(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _virtual_problem(model: Model, config: AdapterConfig, most: int) -> str | None:
    """Return the reason why virtual tokens cannot be part of a row; None if there is none."""
    if config.prefix_gate:
        return "its prefix has a gate, a softmax of its own; give it to all rows with Engine.use"
    if getattr(model.config, "ropes_by_length", ()):
        return (
            "the rotary frequencies of the model depend on the length of the text, so its virtual "
            "tokens cannot be kept; give them to all rows with Engine.use"
        )
    if (config.num_virtual_tokens or 0) > most:
        return (
            f"it has {config.num_virtual_tokens} virtual tokens, and the engine has room for "
            f"max_virtual_tokens={most}"
        )
    return None


def _settings(config: AdapterConfig | Trainable) -> AdapterConfig:
    return config.config if isinstance(config, Trainable) else config
