"""Names of adapters, their versions in host memory, and leases of these."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Info:
    """Public facts of an adapter."""

    name: str
    revision: str | None  # None if it was never read
    rank: int
    resident: str  # device | host | disk
    pinned: bool
    created: int  # seconds since 1970, when its files were written


@dataclass(eq=False)
class Named:
    """A name, its files, and its newest version."""

    name: str
    directory: Path
    state: tuple  # of the files when the name was registered
    pinned: bool = False
    revision: str | None = None
    rank: int = 0
    version: "Version | None" = None  # in host memory

    @property
    def key(self) -> tuple:
        """Key of its files as they are."""
        return self.directory, self.state


@dataclass(eq=False)
class Version:
    """One version of an adapter in host memory, or on its way there."""

    own: Named
    nbytes: int
    ready: asyncio.Future  # of None, once the engine knows the version
    revision: str = ""
    rank: int = 0
    texts: Any = None
    places: int = 0  # virtual tokens, which take room in the text
    leases: int = 0
    used: float = 0.0  # when it was last leased
    current: bool = True  # False once its name has another version, or none

    @property
    def name(self) -> str:
        """Name by which the version is asked for."""
        return self.own.name

    @property
    def directory(self) -> Path:
        """Directory of its files."""
        return self.own.directory


@dataclass(eq=False)
class Lease:
    """The versions that a request uses, with their weights; a context manager."""

    terms: Mapping[str, float]  # weights by name, as asked for
    versions: tuple[Version, ...]
    _free: Callable[["Lease"], None] = field(repr=False)
    _held: bool = True

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """The value of `Request.adapter`: revisions, by which the engine knows the versions."""
        weights = [self.terms[version.name] for version in self.versions]
        found: dict[str, float] = {}
        for version, weight in zip(self.versions, weights, strict=True):
            found[version.revision] = found.get(version.revision, 0.0) + weight
        if not found:
            return None
        return next(iter(found)) if [*found.values()] == [1.0] else found

    @property
    def revision(self) -> str:
        """Revisions of all versions; empty for the base."""
        return "+".join(version.revision for version in self.versions)

    def release(self) -> None:
        """Give the versions back; further calls do nothing. Any thread may call it."""
        self._free(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
