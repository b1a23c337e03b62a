"""A server with the routes that the page uses, whose answers follow from the prompt alone."""

import asyncio
import json
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

import lora_jax

PAGE = Path(lora_jax.__file__).parent / "serve" / "page.html"
BASE, KEY = "tiny", "secret-key"
HOSTILE = "<img src=x onerror=window.hacked=1>"
ADAPTERS = ("alpha", "beta", "gamma", HOSTILE, *(f"style-{number:04}" for number in range(3000)))


def model(name):
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "lora_jax",
        "parent": None if name == BASE else BASE,
        "root": name,
        "max_model_len": 2048,
        "revision": "0" * 64,
        "rank": None if name == BASE else 8,
        "resident": "device" if name in (BASE, "beta") else "disk",
        "pinned": name == "beta",
    }


def refusal(status, message, code=None, headers=None):
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, {"x-request-id": "req-1"} | (headers or {}))


class Stub:
    """What was asked, and how many streams a client left before their end."""

    def __init__(self):
        self.requests, self.keys, self.left, self.key = [], [], 0, None
        self.app = Starlette(
            routes=[
                Route("/", lambda request: HTMLResponse(PAGE.read_text())),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    def forget(self, key=None):
        """Begin anew; from now on a `key` is asked for if one is given."""
        self.requests, self.keys, self.left, self.key = [], [], 0, key

    def locked(self, request):
        given = request.headers.get("authorization")
        self.keys.append(given)
        return self.key and given != f"Bearer {self.key}"

    async def models(self, request):
        if self.locked(request):
            return refusal(401, "Missing or wrong API key.")
        return JSONResponse({"object": "list", "data": [model(one) for one in (BASE, *ADAPTERS)]})

    async def complete(self, request):
        if self.locked(request):
            return refusal(401, "Missing or wrong API key.")
        body = await request.json()
        self.requests.append((request.url.path, body))
        for term in body["model"].split("+"):
            if term.split("*")[0] not in (BASE, *ADAPTERS):
                text = f"No model is named {term!r}."
                return refusal(404, text, "model_not_found")
        chat = request.url.path == "/v1/chat/completions"
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if prompt == "busy":
            return refusal(429, "64 requests are waiting.", headers={"retry-after": "7"})
        return StreamingResponse(self.stream(body, prompt, chat), media_type="text/event-stream")

    async def stream(self, body, prompt, chat):
        """Bytes of events, cut at odd places: characters and line ends come in two parts."""
        ended = False
        try:
            for event in answer(body["model"], prompt, chat):
                data = b": ping\r\n\r\n" + b"data: " + event.encode() + b"\r\n\r\n"
                for start in range(0, len(data), 5):
                    yield data[start : start + 5]
                await asyncio.sleep(0.005)
            ended = True
        finally:
            self.left += not ended


def answer(name, prompt, chat):
    """The events of an answer: the name of its model, then the prompt."""

    def part(text=None, finish=None):
        delta = {"delta": {"content": text} if text else {}} if chat else {"text": text or ""}
        return json.dumps(
            {"choices": [delta | {"index": 0, "finish_reason": finish}]}, ensure_ascii=False
        )

    yield part(f"{name}:")
    if prompt == "breaks":
        yield json.dumps({"error": {"message": "The engine failed.", "code": None}})
        return
    if prompt == "cut":
        return
    words = prompt.split(" ")
    while prompt == "endless":
        yield part(" word")
    for word in words:
        yield part(f" {word}")
    yield part(finish="stop")
    usage = {"prompt_tokens": 5, "completion_tokens": len(words) + 1, "total_tokens": 0}
    yield json.dumps({"choices": [], "usage": usage})
    yield "[DONE]"
