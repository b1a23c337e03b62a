"""Implementation of `lora-jax serve`: the port opens at once, and answers when all is compiled."""

import argparse
import asyncio
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import uvicorn

from lora_jax import formats, lora
from lora_jax.errors import UserError, counted
from lora_jax.formats import fingerprint
from lora_jax.formats.hub import is_hub_name
from lora_jax.generate import Engine, for_decoding
from lora_jax.models.common import Model
from lora_jax.serve.app import App
from lora_jax.serve.driver import Driver
from lora_jax.serve.folder import Folder
from lora_jax.serve.reader import Limits, Reader
from lora_jax.serve.server import Server, Settings
from lora_jax.serve.store import Store
from lora_jax.serve.texts import Texts, base_texts, read_texts

TERMS = 4  # adapters in a weighted sum
_GIB = 2**30


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it.

    Raises:
        UserError: a model, a directory or options that cannot be used; a port that is taken.
    """
    folder = Folder(options.adapter_root)
    source = formats.resolve(options.model)
    described = formats.describe(source, options.ignore_config_fields)
    if described.labels:
        raise UserError(
            f"model={options.model!r} is a classifier and writes no text; `lora-jax eval` scores it"
        )
    length = _length(options.max_model_len, described)
    texts = base_texts(source)
    base = options.served_model_name or _public(options.model, source)
    if base in folder.names():
        raise UserError(
            f"--adapter-root has an adapter with the name of the base, {base}; rename one of them, "
            "with --served-model-name"
        )
    settings = Settings(
        base,
        int((source / "config.json").stat().st_mtime),
        api_key=options.api_key or os.environ.get("LORA_JAX_API_KEY"),
        admin_key=options.admin_key or os.environ.get("LORA_JAX_ADMIN_KEY"),
        timeout=options.timeout,
    )
    app = App(settings)
    listening = _listen(options.host, options.port)
    opening = functools.partial(open_server, options, described, folder, texts, length)
    with listening:
        asyncio.run(_serve(app, options, listening, folder, opening))


def _length(given: int | None, model: Model) -> int:
    """Return the most tokens of a text."""
    most = model.learned_positions or model.config.max_position_embeddings
    if given is None:
        return min(most, 4096)
    if model.learned_positions is not None and given > most:
        raise UserError(f"--max-model-len {given}: the model has {most} positions")
    return given


def _public(spec: str, source: Path) -> str:
    """Return the name of the base for clients, which is never a path."""
    if spec.startswith("demo:"):
        return spec.removeprefix("demo:")
    if is_hub_name(spec):
        return spec
    return Path(spec).stem if spec.endswith(".gguf") else source.resolve().name


def open_server(
    options: argparse.Namespace, described: Model, folder: Folder, texts: Texts, length: int
) -> Server:
    """Load the model and compile all programs."""
    rank = options.max_lora_rank
    _say(f"loading {options.model}")
    model = formats.load(described.directory, dtype=options.base_dtype)
    digest = fingerprint.base_digest(described.directory)
    model = for_decoding(model, donate=True)
    slots = options.max_loras + 1
    bank = lora.bank(model.params, slots=slots, rank=rank, use_dora=options.enable_dora)
    _say(f"{counted(slots - 1, 'slot')} of rank {rank}: {bank.nbytes / 1e6:,.0f} MB")
    engine = Engine(
        model,
        rows=options.max_num_seqs,
        max_length=length,
        bank=bank,
        max_terms=min(TERMS, options.max_loras),
        max_virtual_tokens=options.max_virtual_tokens,
        dtype=jnp.dtype(options.compute_dtype),
    )
    with _Progress(engine):
        programs = engine.warm_up()
    _say(f"{counted(programs, 'program')} compiled; no request compiles another one")
    driver = Driver(engine, max_waiting=options.max_queue)
    driver.start()
    reader = Reader(
        described,
        digest,
        folder,
        Limits(rank=rank),
        lambda directory: read_texts(directory, texts),
        options.allow_change,
    )
    store = Store(
        driver,
        reader,
        host_adapters=options.max_cpu_loras,
        host_bytes=int(options.host_memory_gib * _GIB),
        max_terms=min(TERMS, options.max_loras),
    )
    return Server(engine, driver, store, texts, digest, options.max_loras)


class _Progress:
    """A line every few seconds while programs are compiled."""

    def __init__(self, engine: Engine, every: float = 10.0):
        self._engine, self._every = engine, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> None:
        _say("compiling")
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        began = time.monotonic()
        while not self._done.wait(self._every):
            seconds = time.monotonic() - began
            _say(f"compiling: {self._engine.compiled_programs} programs after {seconds:.0f} s")


class _Uvicorn(uvicorn.Server):
    """Server whose first signal lets running requests end, and whose second ends them."""

    def __init__(self, config: uvicorn.Config, app: App, patience: float):
        super().__init__(config)
        self._app, self._patience = app, patience
        self._loop = asyncio.get_running_loop()
        self._asked = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._asked:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._asked = True
        self._app.drain()
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        server = self._app.ready
        if server is not None:
            _say("draining: no new requests, running ones end")
            await asyncio.to_thread(server.driver.drain, self._patience)
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Open the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port {port}: {host}:{port} cannot be opened: {reason}") from error


async def _serve(
    app: App,
    options: argparse.Namespace,
    listening: socket.socket,
    folder: Folder,
    open_server: Callable[[], Server],
) -> None:
    config = uvicorn.Config(
        app.asgi(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    server = _Uvicorn(config, app, options.drain_timeout)
    address = f"http://{options.host}:{options.port}"

    def opening() -> Server:
        _say(f"listening on {address}; /health answers 503 until all is compiled")
        return open_server()

    loading = asyncio.ensure_future(asyncio.to_thread(opening))

    def opened(done: asyncio.Future) -> None:
        if done.cancelled() or done.exception() is not None:
            server.should_exit = True
            return
        app.start(done.result())
        names = len(folder.names())
        _say(f"ready: {address} answers for {app.settings.base} and {counted(names, 'adapter')}")

    loading.add_done_callback(opened)
    try:
        await server.serve([listening])
    finally:
        if (ready := app.ready) is not None:
            await asyncio.to_thread(ready.driver.stop)
    if loading.done():
        loading.result()
    else:  # a signal while programs are compiled; the thread cannot be stopped
        _say("ended before all was compiled")
        sys.stderr.flush()
        os._exit(0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
