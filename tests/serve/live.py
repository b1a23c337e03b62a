"""A server over a tiny model on a port of loopback, for the tests of the routes."""

import argparse
import contextlib
import json
import socket
import threading
import time

import httpx
import jax
import numpy as np
import uvicorn

from lora_jax import AdapterConfig, formats, lora
from lora_jax.cli import serve as cli
from lora_jax.formats import fingerprint
from lora_jax.serve import command
from lora_jax.serve.app import App
from lora_jax.serve.folder import Folder
from lora_jax.serve.server import Settings
from lora_jax.serve.texts import base_texts

from ..train.tiny import write_model

BASE = "tiny"
NAMES = [f"a{number}" for number in range(8)]
CONFIGS = (
    AdapterConfig(rank=2, alpha=4, target_modules="all-linear"),
    AdapterConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]),
    AdapterConfig(rank=3, alpha=3, target_modules=["down_proj", "o_proj"], use_rslora=True),
)


def write_adapter(model, directory, seed, template=None, **extra):
    """Write an adapter of the model; with a template, it has texts of its own."""
    config = CONFIGS[seed % len(CONFIGS)]
    _, adapters = lora.init(jax.random.key(seed), model.params, config)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape), adapters)
    formats.write_adapter(
        directory,
        adapters,
        model.params,
        config,
        base_model=BASE,
        source=model.directory if template else None,
        chat_template=template,
        extra={"fingerprint": {"base": fingerprint.base_digest(model.directory)}, **extra},
    )


def write_files(home):
    """Write a model and an adapter root; return both directories."""
    source = write_model(home / BASE)
    model = formats.load(source)
    for seed, name in enumerate(NAMES):
        write_adapter(model, home / "root" / name, seed)
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}!"
    write_adapter(model, home / "root" / "own", 3, own, eos_token_id=[200])
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    write_adapter(model, home / "root" / "loop", 4)
    (home / "root" / "loop" / "chat_template.jinja").write_text(loop)
    return source, home / "root"


def options_of(source, root, *more):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    sizes = "--max-num-seqs 4 --max-loras 4 --max-lora-rank 4 --max-model-len 120".split()
    return parser.parse_args(["--model", str(source), "--adapter-root", str(root), *sizes, *more])


def open_server(options):
    source = formats.resolve(options.model)
    texts = base_texts(source)
    described = formats.describe(source)
    length = options.max_model_len
    return command.open_server(options, described, Folder(options.adapter_root), texts, length)


@contextlib.contextmanager
def listening(app):
    """Run an application in a thread; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(
        app.asgi(),
        port=port,
        log_level="error",
        log_config=None,  # its own closes the stream of absl's handler, which pytest has
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Live:
    """A server that answers, and a client of it."""

    def __init__(self, server, app, url):
        self.server, self.app, self.url = server, app, url
        self.client = httpx.Client(base_url=url, timeout=60)

    def get(self, path, **options):
        return self.client.get(path, **options)

    def post(self, path, **body):
        headers = body.pop("headers", None)
        return self.client.post(path, json=body, headers=headers)

    def ok(self, path, **body):
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path, status=400, **body):
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    def events(self, path, **body):
        """The data events of a stream."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def settled(self):
        """Wait until no row, lease or job is left."""
        driver, store = self.server.driver, self.server.store
        until(lambda: not driver.running and not driver.waiting)
        until(lambda: not any(version.leases for version in store._versions))
        until(lambda: self.server.engine.free_rows == 4)


@contextlib.contextmanager
def live(options, **settings):
    """A server for options of the command line."""
    server = open_server(options)
    app = App(Settings(BASE, **settings))
    app.start(server)
    with listening(app) as url:
        yield Live(server, app, url)
    server.driver.stop()
