"""Responses of the server: JSON, events of a stream, errors."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import msgspec
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from lora_jax.serve.complete import Answers, Piece
from lora_jax.serve.errors import ApiError, as_api_error

T = TypeVar("T")


async def timed(answers: Answers, clock: Any, deadline: float) -> AsyncIterator[Piece]:
    """Yield the pieces of answers until a deadline of the loop's clock."""
    pieces = answers.pieces()
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        clock.tokens(len(piece.tokens))
        yield piece


async def collect(pieces: AsyncIterator[T]) -> list[T]:
    """Return all pieces."""
    return [piece async for piece in pieces]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, which is cancelled if the client goes."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return await task
    finally:
        for one in (task, watcher):
            one.cancel()


def as_json(content: Any) -> Response:
    """Return a response of JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")


def event_of(content: Any) -> ServerSentEvent:
    """Return a data event of JSON."""
    return ServerSentEvent(data=msgspec.json.encode(content).decode())


def logged(error: Exception) -> ApiError:
    """Return the error for a client, and print one that is the server's own."""
    found = as_api_error(error)
    if found.status == 500:
        traceback.print_exception(error, file=sys.stderr)
    return found


def error_response(error: Exception) -> Response:
    """Return the response of an error."""
    found = logged(error)
    body = msgspec.json.encode(found.body)
    return Response(body, found.status, found.headers, "application/json")
