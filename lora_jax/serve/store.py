"""Versions of adapters in host memory: found by name, leased by requests, evicted when unused.

    disk --read, checked--> host memory (`Version`, known to the engine by its revision) --> slots

A request leases the versions that it asks for before it waits for a row, and keeps them until it
ends, whatever is replaced, unloaded or evicted meanwhile. The engine loads a version into a slot
when a row needs it. All methods are called in one event loop, except `Lease.release`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from lora_jax.config import quoted
from lora_jax.errors import UserError, nearest
from lora_jax.generate import Engine
from lora_jax.serve.folder import CONFIG, Folder, Missing, check_name, state_of
from lora_jax.serve.leases import Info, Lease, Named, Version
from lora_jax.serve.reader import Read, Reader


class Owner(Protocol):
    """The thread that owns the engine, such as a `Driver`."""

    engine: Engine

    def run(self, work: Callable[[], Any]) -> Awaitable[Any]: ...


class Changed(UserError):
    """Files that are not those that a name was registered with."""


class Store:
    """Adapters by name, over the engine of a driver.

    Args:
        owner: the driver.
        reader: reads adapters; its folder has them.
        host_adapters: versions in host memory, at most.
        host_bytes: bytes of these, at most.
        max_terms: adapters in a weighted sum, at most.
    """

    def __init__(
        self,
        owner: Owner,
        reader: Reader,
        *,
        host_adapters: int = 64,
        host_bytes: int = 2**33,
        max_terms: int = 4,
    ):
        self.host_adapters, self.host_bytes, self.max_terms = host_adapters, host_bytes, max_terms
        self.loads: Counter[str] = Counter()
        self.load_seconds: dict[str, float] = {}
        self.evictions = 0
        self._owner, self._reader = owner, reader
        self._folder: Folder = reader.folder
        self._names: dict[str, Named] = {}
        self._gone: set[str] = set()  # unloaded names, which are not found in the folder again
        self._versions: list[Version] = []  # in host memory: current ones, and those with leases
        self._published: Counter[str] = Counter()  # versions by revision
        self._refused: dict[tuple, str] = {}
        self._line = asyncio.Lock()  # for room in host memory
        self._freed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Future] = set()  # a loop alone does not keep its tasks

    @property
    def host(self) -> tuple[int, int]:
        """Number of versions in host memory, and their bytes."""
        return len(self._versions), sum(version.nbytes for version in self._versions)

    async def infos(self) -> list[Info]:
        """Return the facts of all adapters: those in the folder, and those loaded by name."""
        found = await asyncio.to_thread(self._folder.names)
        names = sorted({*found, *self._names} - self._gone)
        infos = []
        for number, name in enumerate(names):
            if number % 50 == 0:
                await asyncio.sleep(0)  # requests go on
            try:
                infos.append(self._info(self._find(name)))
            except UserError:  # removed meanwhile, or a config that cannot be read
                continue
        return infos

    def info(self, name: str) -> Info:
        """Return the facts of an adapter.

        Raises:
            Missing: there is none. UserError: a name or a config that cannot be read.
        """
        return self._info(self._find(name))

    async def lease(self, terms: Mapping[str, float]) -> Lease:
        """Return a lease of versions with weights, read from disk if necessary. Leases that wait
        for room in host memory are served in order.

        Raises:
            Missing: a name that does not exist. UserError: an adapter that cannot be read; too many
                adapters.
        """
        self._loop = asyncio.get_running_loop()
        if len(terms) > self.max_terms:
            raise UserError(
                f"{len(terms)} adapters in one request are more than the server's {self.max_terms}"
            )
        versions = await self._reserve(lambda: [self._find(name) for name in terms])
        lease = Lease(dict(terms), tuple(versions), self._release)
        try:
            for version in versions:
                await asyncio.shield(version.ready)
        except BaseException:
            lease.release()
            raise
        return lease

    def share(self, lease: Lease) -> Lease:
        """Return one more lease of the versions of a lease that is held."""
        for version in lease.versions:
            version.leases += 1
        return Lease(lease.terms, lease.versions, self._release)

    async def load(self, name: str, path: str, *, replace: bool, pinned: bool) -> Info:
        """Read the adapter at a path below the root and give it a name.

        Raises:
            Missing: no adapter at the path. UserError: a name that is taken, unless `replace`; an
                adapter that cannot be read. The old version stays then.
        """
        self._loop = asyncio.get_running_loop()
        check_name(name)
        directory = await asyncio.to_thread(self._folder.at, path)
        if not replace:
            self._check_free(name, directory)
        new = Named(name, directory, state_of(directory), pinned)
        self._refused.pop(new.key, None)
        (version,) = await self._reserve(lambda: [new])
        try:
            await asyncio.shield(version.ready)
        finally:
            self._free([version])
        old = self._names.get(name)
        if old is not None and old.version is not None:
            self._retire(old.version)
        self._names[name] = new
        self._gone.discard(name)
        return self._info(new)

    def _check_free(self, name: str, directory: Path) -> None:
        """Check that a name has no version, and no other files in the folder."""
        try:
            old = self._find(name)
        except Missing:
            return
        read = old.version is not None or old.revision is not None
        if read or old.directory.resolve() != directory.resolve():
            raise UserError(
                f"adapter {name!r} exists already; set load_inplace to true to replace it"
            )

    def unload(self, name: str) -> None:
        """Forget a name until it is loaded again. Its requests end on the weights that they have.

        Raises:
            Missing: there is none.
        """
        own = self._find(name)
        self._names.pop(name, None)
        self._gone.add(name)
        if own.version is not None:
            self._retire(own.version)

    # Names.

    def _find(self, name: str) -> Named:
        own = self._names.get(name)
        if own is not None:
            if own.version is not None or (own.directory / CONFIG).is_file():
                return own
            if own.revision is not None:  # other files would be another version
                raise Missing(f"the files of adapter {quoted(name)} are gone")
            del self._names[name]
        if name not in self._gone:
            try:
                directory = self._folder.find(name)
            except Missing:
                pass
            else:
                self._names[name] = own = Named(name, directory, state_of(directory))
                return own
        else:
            check_name(name)
        hint = nearest(name, self._names)
        raise Missing(f"there is no adapter {quoted(name)}.{hint}")

    def _info(self, own: Named) -> Info:
        version = own.version
        resident = "disk"
        if version is not None and version.ready.done():
            on_device = version.revision in self._owner.engine.resident
            resident = "device" if on_device else "host"
        if not own.rank:
            own.rank = self._reader.rank(own.name, own.directory)
        created = own.state[0][2] // 10**9 if len(own.state[0]) > 1 else 0
        return Info(own.name, own.revision, own.rank, resident, own.pinned, created)

    # Host memory.

    async def _reserve(self, find: Callable[[], list[Named]]) -> list[Version]:
        """Return leased versions of names, in host memory or on their way there. The names are
        found again after each wait, as they may have other versions then.
        """
        sizes: dict[tuple, int] = {}
        while True:
            for own in find():
                if own.version is None and own.key not in sizes:
                    size = await self._size(own)
                    sizes[own.key] = size
            async with self._line:
                while not self._make_room(find(), sizes):
                    self._freed.clear()
                    await self._freed.wait()
                names = find()
                if all(own.version is not None or own.key in sizes for own in names):
                    return [self._hold(own, sizes) for own in names]

    def _hold(self, own: Named, sizes: Mapping[tuple, int]) -> Version:
        """Return the version of a name with one lease more."""
        if own.version is None:
            own.version = self._start(own, sizes[own.key])
        own.version.leases += 1
        own.version.used = time.monotonic()
        return own.version

    async def _size(self, own: Named) -> int:
        if own.revision is None:
            own.state = state_of(own.directory)  # as they are now: nobody has read them yet
        if (refused := self._refused.get(own.key)) is not None:
            raise UserError(refused)
        try:
            return await asyncio.to_thread(self._reader.bytes, own.name, own.directory)
        except UserError as error:
            self._refuse(own, str(error))
            raise

    def _make_room(self, names: list[Named], sizes: Mapping[tuple, int]) -> bool:
        """Evict versions until those of names fit; return False if they do not."""
        missing = [own for own in names if own.version is None]
        count, size = len(missing), sum(sizes.get(own.key, 0) for own in missing)
        kept = {own.version for own in names}
        pinned = {own.version for own in self._names.values() if own.pinned}
        fixed = [version for version in self._versions if version in pinned or version in kept]
        if len(fixed) + count > self.host_adapters or (
            sum(version.nbytes for version in fixed) + size > self.host_bytes
        ):
            raise UserError(
                f"{count} adapters of {size:,} bytes do not fit the host memory of the server, "
                f"{self.host_adapters} adapters and {self.host_bytes:,} bytes, next to "
                f"{len(fixed)} that are pinned or in the same request"
            )
        idle = [version for version in self._versions if not version.leases]
        idle = [version for version in idle if version not in fixed]
        for version in [None, *sorted(idle, key=lambda version: version.used)]:
            if version is not None:
                self.evictions += 1
                self._drop(version)
            held, held_bytes = self.host
            if held + count <= self.host_adapters and held_bytes + size <= self.host_bytes:
                return True
        return False

    def _start(self, own: Named, nbytes: int) -> Version:
        """Return a version whose files are being read, by a task that no caller can cancel."""
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.exception())  # else asyncio logs it
        version = Version(own, nbytes, future)
        self._versions.append(version)
        version.leases += 1
        self._keep(asyncio.ensure_future(self._read(own, version)))
        return version

    def _keep(self, task: asyncio.Future) -> None:
        """Keep a task until it has ended."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, own: Named, version: Version) -> None:
        began = time.monotonic()
        try:
            read = await asyncio.to_thread(self._read_files, own)
            engine = self._owner.engine
            version.revision, version.rank, version.texts = read.revision, read.rank, read.texts
            version.places = read.config.num_virtual_tokens or 0
            version.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read.adapters))
            self._published[read.revision] += 1
            try:
                await self._owner.run(
                    lambda: engine.publish(read.revision, read.adapters, read.config, read.identity)
                )
            except BaseException:
                self._published[read.revision] -= 1
                version.revision = ""
                raise
        except BaseException as error:
            if isinstance(error, UserError):
                text = str(error).replace(f"{version.revision!r}", f"{own.name!r}")
                if not isinstance(error, Changed):
                    self._refuse(own, text)
                error = UserError(text)
            self._retire(version)
            version.ready.set_exception(error)
        else:
            own.revision, own.rank = read.revision, read.rank
            self.loads[own.name] += 1
            seconds = self.load_seconds.get(own.name, 0.0)
            self.load_seconds[own.name] = seconds + time.monotonic() - began
            version.ready.set_result(None)
        finally:
            self._free([version])

    def _read_files(self, own: Named) -> Read:
        """Read the files of a name, which must be those that it was registered with."""
        changed = Changed(
            f"adapter {own.name!r} has other files than when it was loaded; load it again with "
            "load_inplace set to true"
        )
        known = own.revision is not None
        if known and state_of(own.directory) != own.state:
            raise changed
        read = self._reader.read(own.name, own.directory)
        if known and read.revision != own.revision:
            raise changed
        return read

    def _refuse(self, own: Named, text: str) -> None:
        """Remember why files were refused, so that they are not read at each request."""
        if len(self._refused) >= 10_000:
            self._refused.clear()
        self._refused[own.key] = text

    def _retire(self, version: Version) -> None:
        """Take a version from its name; it is dropped when nobody uses it."""
        version.current = False
        if version.own.version is version:
            version.own.version = None
        if not version.leases:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        if version not in self._versions:
            return
        self._versions.remove(version)
        if version.own.version is version:
            version.own.version = None
        if version.revision:
            self._published[version.revision] -= 1
            if not self._published[version.revision]:
                del self._published[version.revision]
                self._withdraw(version.revision)
        self._freed.set()

    def _withdraw(self, revision: str) -> None:
        def work() -> None:
            if not self._published[revision] and revision in self._owner.engine.adapters:
                self._owner.engine.withdraw(revision)

        task = asyncio.ensure_future(self._owner.run(work))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._keep(task)

    def _release(self, lease: Lease) -> None:
        if not lease._held:
            return
        lease._held = False
        if lease.versions and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._free, lease.versions)

    def _free(self, versions: Any) -> None:
        for version in versions:
            version.leases -= 1
            if not version.leases and not version.current:
                self._drop(version)
        self._freed.set()
