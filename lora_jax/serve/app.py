"""The routes of the server."""

import asyncio
import contextlib
import importlib.resources
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lora_jax.errors import UserError
from lora_jax.serve import protocol
from lora_jax.serve.answers import ChatForm, Form
from lora_jax.serve.complete import Answers, Asked, Piece
from lora_jax.serve.driver import Closed
from lora_jax.serve.errors import ApiError, as_api_error
from lora_jax.serve.grammars import Grammar, source_of
from lora_jax.serve.guard import Guard
from lora_jax.serve.leases import Info, Lease
from lora_jax.serve.metrics import Metrics
from lora_jax.serve.names import parse_model
from lora_jax.serve.respond import (
    as_json,
    collect,
    error_response,
    event_of,
    logged,
    timed,
    unless_gone,
)
from lora_jax.serve.server import Server, Settings
from lora_jax.serve.texts import Texts

_PAGE_HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class App:
    """The application; `start` gives it the server when that is ready."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = Metrics()
        self._server: Server | None = None
        self._draining = False

    def start(self, server: Server) -> None:
        """Answer requests from now on."""
        self._server = self.metrics.server = server

    @property
    def ready(self) -> Server | None:
        """The server if it was started, also while it drains."""
        return self._server

    def drain(self) -> None:
        """Refuse requests from now on; those that run go on."""
        self._draining = True

    @property
    def server(self) -> Server:
        """The server.

        Raises:
            Closed: it is not ready, or drains.
        """
        if self._server is None:
            raise Closed("the server is starting: programs are being compiled")
        if self._draining or self._server.driver.draining:
            raise Closed("the server is shutting down")
        return self._server

    def asgi(self) -> Guard:
        """Return the ASGI application."""
        both = (("tokenize", self.tokenize), ("detokenize", self.detokenize))
        routes = [
            self._route("/health", self.health),
            self._route("/v1/models", self.models),
            self._route("/v1/models/{name:path}", self.model),
            self._route("/v1/completions", self.completions, "POST"),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/load_lora_adapter", self.load, "POST"),
            self._route("/v1/unload_lora_adapter", self.unload, "POST"),
            *(self._route(f"{at}/{name}", f, "POST") for at in ("", "/v1") for name, f in both),
            *(self._route(f"{at}/tokenizer_info", self.tokenizer_info) for at in ("", "/v1")),
            self._route("/metrics", self.show_metrics),
            self._route("/", self.page),
        ]
        handlers: Any = {404: self._no_route, 405: self._no_method}
        own = self.settings
        return Guard(
            Starlette(routes=routes, exception_handlers=handlers),
            self.metrics,
            api_key=own.api_key,
            admin_key=own.admin_key,
            max_body=own.max_body,
        )

    def _route(
        self, path: str, work: Callable[[Request], Awaitable[Response]], method: str = "GET"
    ) -> Route:
        async def answer(request: Request) -> Response:
            try:
                return await work(request)
            except Exception as error:
                return error_response(error)

        return Route(path, answer, methods=[method])

    async def _no_route(self, request: Request, error: Exception) -> Response:
        return error_response(ApiError(404, f"there is no route {request.url.path}"))

    async def _no_method(self, request: Request, error: Any) -> Response:
        message = f"{request.url.path} does not answer {request.method}"
        response = error_response(ApiError(405, message))
        response.headers.update(error.headers or {})
        return response

    # Small routes.

    async def health(self, request: Request) -> Response:
        server = self.server
        if server.driver.failed is not None:
            raise Closed("the engine has failed")
        return as_json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        server = self.server
        infos = await server.store.infos()
        cards = [self._base_card(server), *(self._card(server, info) for info in infos)]
        return as_json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        server, name = self.server, request.path_params["name"]
        if name == self.settings.base:
            return as_json(self._base_card(server))
        return as_json(self._card(server, server.store.info(self._adapter(name))))

    async def load(self, request: Request) -> Response:
        server = self.server
        asked = protocol.parse(await request.body(), protocol.LoadRequest)
        if asked.lora_name == self.settings.base:
            raise ApiError(400, "lora_name is the name of the base", param="lora_name")
        try:
            info = await server.store.load(
                asked.lora_name,
                asked.lora_path,
                replace=asked.load_inplace,
                pinned=asked.pinned,
            )
        except UserError as error:
            found = as_api_error(error)
            found.param = "lora_path" if found.status == 404 else None
            raise found from error
        return as_json(self._card(server, info))

    async def unload(self, request: Request) -> Response:
        asked = protocol.parse(await request.body(), protocol.UnloadRequest)
        self.server.store.unload(asked.lora_name)
        return as_json({"status": "ok", "lora_name": asked.lora_name})

    async def tokenize(self, request: Request) -> Response:
        asked = protocol.parse(await request.body(), protocol.TokenizeRequest)
        async with self._leased(asked.model) as (texts, _):
            tokens = await asyncio.to_thread(texts.encode, asked.prompt, asked.add_special_tokens)
        most = self.server.engine.max_length
        return as_json({"count": len(tokens), "max_model_len": most, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        asked = protocol.parse(await request.body(), protocol.DetokenizeRequest)
        async with self._leased(asked.model) as (texts, _):
            check_ids(asked.tokens, "tokens", self.server.engine.model.config.vocab_size)
            text = await asyncio.to_thread(texts.tokenizer.decode, asked.tokens)
        return as_json({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        async with self._leased(request.query_params.get("model")) as (texts, _):
            own = texts.tokenizer
            names = ("eos_token", "bos_token", "pad_token", "chat_template")
            return as_json({name: getattr(own, name, None) for name in names})

    async def show_metrics(self, request: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(), media_type=kind)

    async def page(self, request: Request) -> Response:
        file = importlib.resources.files("lora_jax.serve").joinpath("page.html")
        return HTMLResponse(file.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    # Completions.

    async def completions(self, request: Request) -> Response:
        asked = protocol.parse(await request.body(), protocol.CompletionRequest)
        protocol.check_counts(asked)
        given = protocol.prompts_of(asked.prompt)
        if asked.max_tokens == 0 and not asked.echo:
            raise protocol.refused("max_tokens", "0 only with echo: true")

        size = self.server.engine.model.config.vocab_size

        def make(texts: Texts, room: int) -> Asked:
            prompts = [
                texts.encode(one, asked.add_special_tokens) if isinstance(one, str) else one
                for one in given
            ]
            for prompt in prompts:
                check_ids(prompt, "prompt", size)
            longest = max(map(len, prompts))
            most = min(16, max(1, room - longest)) if asked.max_tokens is None else asked.max_tokens
            wanted = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
            wanted += [0] if most == 0 else []
            of_prompt = max((one for one in wanted if one is not None), default=None)
            echoed = None
            if asked.echo:
                echoed = [
                    one if isinstance(one, str) else texts.tokenizer.decode(one) for one in given
                ]
            return Asked(asked, prompts, texts, most, asked.logprobs, of_prompt, echoed)

        return await self._answer(request, asked, make, Form, "cmpl")

    async def chat(self, request: Request) -> Response:
        asked = protocol.parse(await request.body(), protocol.ChatRequest)
        protocol.check_counts(asked)
        if not asked.messages:
            raise protocol.refused("messages", "must not be empty")
        if asked.top_logprobs and not asked.logprobs:
            raise protocol.refused("top_logprobs", "only with logprobs: true")

        def make(texts: Texts, room: int) -> Asked:
            prompt = texts.encode_chat(asked)
            limits = [asked.max_tokens, asked.max_completion_tokens]
            most = min((one for one in limits if one is not None), default=room - len(prompt))
            if most < 1 and limits != [None, None]:
                raise protocol.refused("max_tokens", "must be at least 1")
            top = asked.top_logprobs if asked.logprobs else None
            return Asked(asked, [prompt], texts, max(1, most), top, asked.prompt_logprobs)

        return await self._answer(request, asked, make, ChatForm, "chatcmpl")

    async def _answer(
        self,
        request: Request,
        asked: protocol.Sampled,
        make: Callable[[Texts, int], Asked],
        form_of: type[Form],
        prefix: str,
    ) -> Response:
        """Lease, tokenise, queue and answer. What fails before the first byte has a status."""
        server = self.server
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        async with asyncio.timeout_at(deadline):
            lease = await server.store.lease(self._terms(asked.model))
            try:
                texts = self._texts(server, lease)
                room = server.engine.max_length - lease_places(lease)
                made = await asyncio.to_thread(make, texts, room)
                made = await asyncio.to_thread(self._with_grammar, made)
                count = len(made.prompts) * asked.n
                if count > server.driver.max_waiting:
                    raise protocol.refused("n", f"{count} choices are more than the queue holds")
                leases = [lease, *(server.store.share(lease) for _ in range(count - 1))]
            except BaseException:
                lease.release()
                raise
            answers = Answers(server.driver, leases, made)
            answers.submit()
        form = form_of(f"{prefix}-{secrets.token_hex(12)}", made, self._fingerprint(server, lease))
        clock = self.metrics.clock(asked.model if lease.versions else self.settings.base)
        pieces = timed(answers, clock, deadline)
        if asked.stream:
            return EventSourceResponse(
                self._stream(answers, form, pieces),
                ping=self.settings.ping,  # type: ignore[arg-type]
                ping_message_factory=lambda: ServerSentEvent(comment="ping"),
                sep="\n",
            )
        try:
            found = await unless_gone(request, collect(pieces))
        finally:
            answers.close()
        return as_json(form.whole(found))

    def _with_grammar(self, asked: Asked) -> Asked:
        found = source_of(asked.request)
        if found is None:
            return asked
        field, source = found
        vocab = self.server.engine.model.config.vocab_size
        try:
            return replace(asked, grammar=Grammar(asked.texts.tokenizer, vocab, source))
        except UserError as error:
            raise protocol.refused(field, str(error)) from error

    async def _stream(
        self, answers: Answers, form: Form, pieces: AsyncIterator[Piece]
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            async for piece in pieces:
                for chunk in form.chunks(piece):
                    yield event_of(chunk)
            for chunk in form.last_chunks():
                yield event_of(chunk)
        except Exception as error:
            yield event_of(logged(error).body)
        finally:
            answers.close()
        yield ServerSentEvent(data="[DONE]")

    # Names.

    def _terms(self, model: str) -> dict[str, float]:
        try:
            return parse_model(model, self.settings.base)
        except UserError as error:
            raise ApiError(400, str(error), param="model") from error

    def _adapter(self, name: str) -> str:
        """Return the adapter of a name that is no sum."""
        terms = self._terms(name)
        if [*terms.values()] != [1.0]:
            raise ApiError(404, f"{name!r} is not one model", param="model", code="model_not_found")
        return next(iter(terms))

    @contextlib.asynccontextmanager
    async def _leased(self, model: str | None) -> AsyncIterator[tuple[Texts, Lease]]:
        server = self.server
        name = self.settings.base if model is None else model
        with await server.store.lease(self._terms(name)) as lease:
            yield self._texts(server, lease), lease

    def _texts(self, server: Server, lease: Lease) -> Texts:
        """Return the texts of an adapter; of a sum, those of its first term."""
        return lease.versions[0].texts if lease.versions else server.texts

    def _fingerprint(self, server: Server, lease: Lease) -> str:
        own = f"base-{server.digest.rpartition(':')[2][:12]}"
        return f"{own}+{lease.revision}" if lease.versions else own

    def _base_card(self, server: Server) -> dict[str, Any]:
        base = self.settings.base
        return {
            "id": base,
            "object": "model",
            "created": self.settings.created,
            "owned_by": "lora_jax",
            "parent": None,
            "root": base,
            "max_model_len": server.engine.max_length,
            "revision": server.digest,
            "rank": 0,
            "resident": "device",
            "pinned": True,
        }

    def _card(self, server: Server, info: Info) -> dict[str, Any]:
        return {
            **self._base_card(server),
            "id": info.name,
            "created": info.created,
            "parent": self.settings.base,
            "root": info.name,
            "revision": info.revision,
            "rank": info.rank,
            "resident": info.resident,
            "pinned": info.pinned,
        }


def check_ids(tokens: Sequence[int], field: str, size: int) -> None:
    """Check that tokens are ids of a vocabulary.

    Raises:
        ApiError: 400 that names the field.
    """
    if any(not 0 <= token < size for token in tokens):
        raise protocol.refused(field, f"token ids must be from 0 to {size - 1}")


def lease_places(lease: Lease) -> int:
    """Return the virtual tokens of a lease, which take room in the text."""
    return sum(version.places for version in lease.versions)
