"""The thread that owns an engine: it takes jobs from other threads, and gives them their events.

An engine is not safe to call from several threads, and a step takes as long as a token. All calls
of the engine are made here, between steps.
"""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_jax.errors import UserError
from lora_jax.generate import Engine, Event, Request
from lora_jax.serve.turns import Turns

T = TypeVar("T")


class Full(UserError):
    """The queue is full. `retry_after` is an estimate in seconds."""

    retry_after = 1


class Closed(UserError):
    """The server starts, drains or has failed; another one may answer."""


@dataclass(eq=False)
class Job:
    """A request and the caller that waits for its answer.

    Args:
        request: its adapters are those of the lease.
        lease: released when the job ends, however it ends.
        on_event: called in the driver's thread. The last call has an event with a finish_reason, or
            an exception. A job that is cancelled gets no further call.
    """

    request: Request
    lease: Any
    on_event: Callable[[Event | BaseException], None]
    id: int | None = field(default=None, init=False)  # in the engine

    @property
    def key(self) -> Hashable:
        """The adapters of the job, which take turns."""
        adapter = self.request.adapter
        return tuple(sorted(adapter.items())) if isinstance(adapter, Mapping) else adapter


class Driver:
    """Runs the engine until it is drained or stopped.

    Args:
        engine: the engine; nobody else calls it from now on.
        max_waiting: jobs that may wait for a row.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256):
        self.engine, self.max_waiting = engine, max_waiting
        self.failed: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._turns: Turns[Job] = Turns(max(1, engine.free_rows))
        self._rows: dict[int, Job] = {}
        self._queued = 0  # jobs submitted and not in the engine yet
        self._lock = threading.Lock()
        self._draining, self._stopping, self._ended = False, False, False
        self._usage = 0.0
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. If it cannot be queued, its lease is released.

        Raises:
            UserError: a request that the engine refuses. Full: too many jobs wait. Closed: the
                server drains or has failed.
        """
        try:
            self._check(job)
            with self._lock:
                self._check_open()
                if self._queued >= self.max_waiting:
                    raise Full(f"{self._queued} requests wait already; try again later")
                self._queued += 1
                self._idle.clear()
                self._inbox.put(lambda: self._turns.add(job.key, job))
        except BaseException:
            job.lease.release()
            raise

    def cancel(self, job: Job) -> None:
        """End a job that waits or runs, and free its row and its lease. One that has ended is left
        alone.
        """
        self._inbox.put(lambda: self._cancel(job))

    async def run(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, called between two steps in the driver's thread.

        Raises:
            Closed: the server has failed. Whatever `work` raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def answer(set_it: Callable[[Any], None], value: Any) -> None:
            if not future.done():  # its caller may have gone
                set_it(value)

        def call() -> None:
            try:
                found, set_it = work(), future.set_result
            except BaseException as error:
                found, set_it = error, future.set_exception
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(answer, set_it, found)

        with self._lock:
            self._check_alive()
            self._inbox.put(call)
        return await future

    def drain(self, timeout: float) -> bool:
        """Refuse new jobs, and wait for those that are queued; return False if some are left."""
        self._draining = True
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """End the thread after its step. Jobs that are left get `Closed`."""
        self._draining = self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def draining(self) -> bool:
        """True once no new job is taken."""
        return self._draining

    @property
    def running(self) -> int:
        """Number of jobs in the engine."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a row."""
        return self._queued

    @property
    def cache_usage(self) -> float:
        """Share of the cache in use, 0 to 1."""
        return self._usage

    def running_leases(self) -> list[Any]:
        """Return the leases of the jobs in the engine."""
        return [job.lease for job in self._rows.copy().values()]

    def waiting_leases(self) -> list[Any]:
        """Return the leases of the jobs that wait."""
        return [job.lease for job in self._turns.jobs()]

    def _check(self, job: Job) -> None:
        """Check a request, with names in errors in place of the engine's."""
        try:
            self.engine.check(job.request)
        except UserError as error:
            text = str(error)
            for version in job.lease.versions:
                text = text.replace(version.revision, version.name)
            raise UserError(text) from error

    def _check_open(self) -> None:
        self._check_alive()
        if self._draining:
            raise Closed("the server is shutting down")

    def _check_alive(self) -> None:
        if self.failed is not None:
            raise Closed(self._failure)
        if self._ended:
            raise Closed("the server has shut down")

    # In the driver's thread.

    def _work(self) -> None:
        while not self._stopping:
            try:
                self._read_inbox()
                self._admit()
                for event in self.engine.step() if self.engine.busy else ():
                    self._deliver(event)
                self._usage = self.engine.cache_usage
            except BaseException as error:
                self._fail(error)
            self._update_idle()
        with self._lock:
            self._ended = True  # nothing arrives any more
        self._inbox.put(lambda: None)
        self._read_inbox()
        reason = "the server has shut down" if self.failed is None else self._failure
        self._end_all(Closed(reason))
        self._update_idle()

    @property
    def _failure(self) -> str:
        return f"the engine has failed: {type(self.failed).__name__}"

    def _read_inbox(self) -> None:
        """Make the calls that arrived; wait for one if there is nothing else to do."""
        wait = not self.engine.busy and not len(self._turns)
        while True:
            try:
                call = self._inbox.get(block=wait)
            except queue.Empty:
                return
            call()
            wait = False

    def _admit(self) -> None:
        while len(self._turns) and self.engine.free_rows > 0:
            job = self._turns.take()
            with self._lock:
                self._queued -= 1
            try:
                job.id = self.engine.submit(job.request)
            except UserError as error:
                self._end(job, error)
                continue
            self._rows[job.id] = job

    def _deliver(self, event: Event) -> None:
        job = self._rows.get(event.id)
        if job is None:
            return
        if event.finish_reason is not None:
            del self._rows[event.id]
            self._end(job, event if event.error is None else event.error)
        elif not self._tell(job, event):
            self._cancel(job)

    def _tell(self, job: Job, event: Event | BaseException) -> bool:
        """Call a job; return False if the caller has gone."""
        try:
            job.on_event(event)
        except RuntimeError:  # the event loop is closed
            return False
        return True

    def _end(self, job: Job, last: Event | BaseException) -> None:
        job.lease.release()
        self._tell(job, last)

    def _cancel(self, job: Job) -> None:
        if self._turns.remove(job.key, job):
            with self._lock:
                self._queued -= 1
            job.lease.release()
        elif job.id is not None and self._rows.pop(job.id, None) is not None:
            self.engine.cancel(job.id)
            job.lease.release()

    def _fail(self, error: BaseException) -> None:
        """Give all jobs the error of an engine that is broken, and take no more."""
        self.failed, self._stopping = error, True
        traceback.print_exception(error)
        self._end_all(Closed(self._failure))

    def _end_all(self, error: Closed) -> None:
        jobs, self._rows = list(self._rows.values()), {}
        while len(self._turns):
            jobs.append(self._turns.take())
        for job in jobs:
            self._end(job, error)

    def _update_idle(self) -> None:
        with self._lock:
            if self._stopping or not (self._queued or self._rows):
                self._idle.set()
