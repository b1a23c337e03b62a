"""Checks around every request: keys, size of the body, an ID, a line in the log."""

import hmac
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from lora_jax.serve.errors import ApiError
from lora_jax.serve.metrics import Metrics

Scope: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_OPEN = ("/health", "/")
_ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ID = re.compile(r"[\x21-\x7e]{1,200}")


class Guard:
    """ASGI middleware.

    Args:
        app: the application.
        metrics: counts statuses.
        api_key: needed for everything but the page and /health; None: nobody needs one.
        admin_key: needed to load and unload adapters; None: nobody can.
        max_body: bytes.
    """

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        max_body: int = 2**24,
    ):
        self._app, self._metrics = app, metrics
        self._api_key, self._admin_key, self._max_body = api_key, admin_key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        own = given if _ID.fullmatch(given) else secrets.token_hex(16)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), send_with_id)
        except ApiError as error:
            if status:
                raise
            await respond(send_with_id, error)
        finally:
            self._metrics.answered(status)
            seconds = time.monotonic() - began
            path = scope["path"].encode("unicode_escape").decode()  # one line, whatever it has
            line = f"{scope['method']} {path} {status} {seconds:.2f} s"
            print(line, file=sys.stderr, flush=True)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if int(headers.get(b"content-length") or 0) > self._max_body:
            raise self._too_large()
        path = scope["path"]
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else b""
        if path in _ADMIN:
            if self._admin_key is None:
                raise ApiError(
                    403,
                    "adapters cannot be loaded or unloaded: start the server with --admin-key",
                )
            if not _is(key, self._admin_key):
                known = self._api_key is not None and _is(key, self._api_key)
                raise ApiError(403 if known else 401, "this route needs the admin key")
        elif self._api_key is not None and path not in _OPEN:
            admin = self._admin_key is not None and _is(key, self._admin_key)
            if not (_is(key, self._api_key) or admin):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body:,} bytes")


def _is(given: bytes, key: str) -> bool:
    return hmac.compare_digest(given, key.encode())


async def respond(send: Send, error: ApiError) -> None:
    """Send an error."""
    headers = {"content-type": "application/json", **error.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": msgspec.json.encode(error.body)})
