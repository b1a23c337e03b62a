"""Settings of a server, and the parts that answer."""

from dataclasses import dataclass

from lora_jax.generate import Engine
from lora_jax.serve.driver import Driver
from lora_jax.serve.store import Store
from lora_jax.serve.texts import Texts


@dataclass
class Settings:
    """Settings of the HTTP side.

    Args:
        base: name of the base in requests.
        created: seconds since 1970, when its files were written.
        api_key, admin_key: see `Guard`.
        timeout: seconds that a request may take.
        ping: seconds between comments in a stream, which keep it open.
        max_body: bytes of a body.
    """

    base: str
    created: int = 0
    api_key: str | None = None
    admin_key: str | None = None
    timeout: float = 600.0
    ping: float = 15.0
    max_body: int = 2**24


@dataclass
class Server:
    """Parts of a server that is ready."""

    engine: Engine
    driver: Driver
    store: Store
    texts: Texts  # of the base
    digest: str  # of the base's weights
    max_loras: int
