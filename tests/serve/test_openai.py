"""The client of OpenAI: every route, streams and errors."""

import openai
import pytest

from .live import BASE, NAMES, live, options_of, write_files

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    with live(options_of(*files), api_key="key") as served:
        found = openai.OpenAI(base_url=f"{served.url}/v1", api_key="key", max_retries=0)
        found.served = served
        yield found


def test_models(client):
    assert {model.id for model in client.models.list()} == {BASE, *NAMES, "own", "loop"}
    assert client.models.retrieve("a1").parent == BASE


def test_completions(client):
    whole = client.completions.create(
        model="a1", prompt=["a", "b"], max_tokens=6, temperature=0, logprobs=2, n=2, seed=1
    )
    assert len(whole.choices) == 4 and whole.usage.completion_tokens >= 4
    assert len(whole.choices[0].logprobs.top_logprobs) == whole.usage.completion_tokens // 4
    pieces = client.completions.create(
        model="a1", prompt="a", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(one.choices[0].text for one in pieces) == whole.choices[0].text


def test_conversations(client):
    settings = dict(model="a2", messages=HELLO, max_completion_tokens=9, temperature=0.5, seed=4)
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    stream = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"


def test_errors(client):
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no adapter 'nothing'"):
        ask(model="nothing", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="lora_path: name the adapter in `model`"):
        ask(model=BASE, messages=HELLO, extra_body={"lora_path": "a1"})
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model=BASE, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="no").models.list()
    with pytest.raises(openai.BadRequestError, match="stop"):
        ask(model=BASE, messages=HELLO, stop=[""], stream=True)


def test_a_stream_that_is_closed_frees_its_row(client):
    stream = client.completions.create(
        model="a3", prompt="a", max_tokens=90, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    client.served.settled()
