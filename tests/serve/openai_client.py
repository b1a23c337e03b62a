"""The client of OpenAI against a server: every route, streams and errors.

    python openai_client.py URL

makes all checks with the version of openai that it imports, and prints the version and their names.
It imports nothing else of the tests.
"""

import asyncio
import json
import sys

import openai

BASE = "tiny"
NAMES = {"tiny", "own", "loop", *(f"a{number}" for number in range(8))}
KEY, ADMIN_KEY = "key", "admin"
LARGE = 20_000  # bytes that the server takes
BREAKS = 13  # seed with which a stream of the server ends in an error
HELLO = [{"role": "user", "content": "hello"}]


def open_client(url, kind=openai.OpenAI):
    return kind(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def raised(kind, ask, *arguments, **settings):
    """The error of a request, which must be of a kind."""
    try:
        ask(*arguments, **settings)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def check_models(client):
    assert {model.id for model in client.models.list()} == NAMES
    assert client.models.retrieve("a1").parent == BASE
    error = raised(openai.NotFoundError, client.models.retrieve, "nothing")
    assert error.code == "model_not_found" and error.status_code == 404


def check_completions(client):
    settings = dict(model="a1", max_tokens=6, temperature=0)
    whole = client.completions.create(prompt=["a", "b"], logprobs=2, n=2, seed=1, **settings)
    assert len(whole.choices) == 4 and whole.usage.completion_tokens >= 4
    first = whole.choices[0]
    assert len(first.logprobs.top_logprobs) == whole.usage.completion_tokens // 4
    pieces = list(
        client.completions.create(
            prompt="a", stream=True, stream_options={"include_usage": True}, **settings
        )
    )
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens // 4
    assert "".join(one.choices[0].text for one in pieces[:-1]) == first.text
    assert pieces[-2].choices[0].finish_reason == first.finish_reason
    echoed = client.completions.create(prompt="a", echo=True, logprobs=0, **settings)
    assert echoed.choices[0].text == "a" + first.text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None


def check_prompts_of_tokens(client):
    """A prompt is tokenised the same by all; the answer has an ID."""
    tokens = client.post("/tokenize", body={"prompt": "ab"}, cast_to=object)["tokens"]
    more = {"return_token_ids": True, "ignore_eos": True}
    settings = dict(model="a2", max_tokens=5, temperature=0, extra_body=more)
    plain = client.completions.create(prompt="ab", **settings)
    raw = client.completions.with_raw_response.create(
        prompt=[tokens, tokens], extra_headers={"x-request-id": "mine"}, **settings
    )
    assert raw.headers["x-request-id"] == "mine"
    found = raw.parse()
    assert [choice.text for choice in found.choices] == [plain.choices[0].text] * 2
    assert found.choices[0].token_ids == plain.choices[0].token_ids
    assert len(plain.choices[0].token_ids) == 5
    assert plain.choices[0].prompt_token_ids == tokens


def check_conversations(client):
    settings = dict(model="a2", messages=HELLO, max_completion_tokens=9, temperature=0.5, seed=4)
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens and len(content[0].top_logprobs) == 3
    stream = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    with client.chat.completions.stream(**settings, stop=text[3:5]) as events:
        last = events.get_final_completion().choices[0]  # refuses an answer of full length
    assert last.message.content == text[: text.index(text[3:5])]
    assert last.message.role == "assistant" and last.finish_reason == "stop"


def check_errors(client):
    ask = client.chat.completions.create
    error = raised(openai.NotFoundError, ask, model="nothing", messages=HELLO)
    assert "there is no adapter 'nothing'" in str(error) and error.param == "model"
    more = {"lora_path": "a1"}
    error = raised(openai.BadRequestError, ask, model=BASE, messages=HELLO, extra_body=more)
    assert "lora_path: name the adapter in `model`" in str(error)
    error = raised(openai.BadRequestError, ask, model=BASE, messages=HELLO, temperature=-1)
    assert error.param == "temperature" and error.type == "invalid_request_error"
    error = raised(openai.BadRequestError, ask, model=BASE, messages=HELLO, stop=[""], stream=True)
    assert "stop" in str(error)
    raised(openai.AuthenticationError, client.with_options(api_key="no").models.list)
    long = {"model": BASE, "prompt": "a" * LARGE}
    assert raised(openai.APIStatusError, client.completions.create, **long).status_code == 413


def check_error_in_a_stream(client):
    stream = client.completions.create(
        model=BASE, prompt="a", max_tokens=2, seed=BREAKS, stream=True
    )
    error = raised(openai.APIError, list, stream)
    assert "internal error" in error.message


def check_closed_stream(client):
    """A stream may be left; the next request is answered."""
    more = {"ignore_eos": True}
    ask = client.completions.create
    stream = ask(model="a3", prompt="a", max_tokens=90, stream=True, extra_body=more)
    next(iter(stream))
    stream.close()
    assert ask(model="a3", prompt="a", max_tokens=2).choices


def check_other_routes(client):
    url = str(client.base_url).removesuffix("/v1/")
    assert client.get(f"{url}/health", cast_to=object) == {"status": "ok"}
    assert "vllm:num_requests_running" in client.get(f"{url}/metrics", cast_to=str)
    assert "<html" in client.get(f"{url}/", cast_to=str)
    tokens = client.post("/tokenize", body={"prompt": "héllo"}, cast_to=object)["tokens"]
    for path in ("/detokenize", f"{url}/detokenize"):
        assert client.post(path, body={"tokens": tokens}, cast_to=object) == {"prompt": "héllo"}
    info = client.get("/tokenizer_info", cast_to=object)
    assert info["eos_token"] == "<|im_end|>"


def check_adapters_come_and_go(client):
    load, unload = "/load_lora_adapter", "/unload_lora_adapter"
    given = {"lora_name": "x", "lora_path": "a2"}
    raised(openai.PermissionDeniedError, client.post, load, body=given, cast_to=object)
    admin = client.with_options(api_key=ADMIN_KEY)
    assert admin.post(load, body=given, cast_to=object)["parent"] == BASE
    error = raised(openai.BadRequestError, admin.post, load, body=given, cast_to=object)
    assert "load_inplace" in str(error)
    texts = [
        client.completions.create(model=name, prompt="a", max_tokens=6, temperature=0)
        for name in ("a2", "x")
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text
    admin.post(unload, body={"lora_name": "x"}, cast_to=object)
    raised(openai.NotFoundError, client.completions.create, model="x", prompt="a")


def check_many_at_once(client):
    """The client of coroutines: adapters answer as they do alone."""
    url = str(client.base_url).removesuffix("/v1/")
    settings = dict(messages=HELLO, max_tokens=8, temperature=0)
    names = [f"a{number}" for number in range(8)] * 2

    async def stream(client, name):
        pieces = await client.chat.completions.create(model=name, stream=True, **settings)
        return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

    async def together():
        async with open_client(url, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(stream(client, name) for name in names))

    for name, text in zip(names, asyncio.run(together()), strict=True):
        alone = client.chat.completions.create(model=name, **settings)
        assert alone.choices[0].message.content == text


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


if __name__ == "__main__":
    with open_client(sys.argv[1]) as opened:
        for check in CHECKS.values():
            check(opened)
    print(json.dumps({"version": openai.__version__, "checks": [*CHECKS]}))
