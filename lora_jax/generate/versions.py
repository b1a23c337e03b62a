"""Published adapters, and which of them are in the slots of a bank.

A name refers to its newest version. A request keeps the version that it was submitted with until
it ends, also if the name is published again or withdrawn meanwhile. A version is loaded into a slot
when a request needs it, in place of the one that was not used for the longest time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.bank import Bank
from lora_jax.config import AdapterConfig
from lora_jax.errors import UserError, nearest
from lora_jax.sharding import gather_to_host
from lora_jax.targets import Trainable
from lora_jax.tree import dotted, flatten


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


class Versions:
    """Published adapters over one bank, whose slot 0 is the base."""

    def __init__(self, bank: Bank | None):
        self.bank = bank
        self._current: dict[str, Version] = {}
        self._slots: dict[int, Version] = {}
        self._clock = 0

    def publish(
        self, name: str, adapters: Mapping[str, Any], config: AdapterConfig | Trainable
    ) -> Version:
        """Return a new version of `name`, with a copy of the adapters. The same weights and config
        as before give the version that exists.

        Raises:
            UserError: an engine without slots; adapters that the bank refuses.
        """
        if self.bank is None:
            raise UserError(f"adapter {name!r}: the engine has no slots; make it with max_loras=1")
        self.bank.check(adapters, config)
        copy = jax.tree.map(gather_to_host, dict(adapters))
        version = Version(name, _identity(copy, config), copy, config)
        known = self._current.get(name)
        if known is not None and known.identity == version.identity:
            return known
        self._current[name] = version
        if (slot := self._free_slot()) is not None:
            self._load(version, slot)
        return version

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
            raise UserError(f"adapter {name!r} is not published; there are: {known}{hint}")
        return self._current[name]

    @property
    def names(self) -> list[str]:
        return sorted(self._current)

    def acquire(self, versions: list[Version]) -> list[int] | None:
        """Return the slots of versions, loaded if necessary, and count a user of each; None if not
        all of them can be in a slot now.
        """
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
        return [int(version.slot or 0) for version in versions]

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
        assert self.bank is not None
        slots = range(1, self.bank.slots)
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


def _identity(adapters: Mapping[str, Any], config: AdapterConfig | Trainable) -> str:
    """Return the SHA-256 of the weights of adapters and of their settings."""
    settings = config.config if isinstance(config, Trainable) else config
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True, default=str).encode())
    for path, leaf in sorted(flatten(adapters).items()):
        array = np.asarray(leaf)
        digest.update(f"{dotted(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
