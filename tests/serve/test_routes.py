"""The routes of the server: completions, conversations, streams, errors, keys, metrics."""

import json
import threading

import httpx
import numpy as np
import pytest

from lora_jax import formats
from lora_jax.generate import Engine, Request

from .adapters import merged
from .live import BASE, NAMES, listening, live, options_of, until, write_adapter, write_files

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PROMPT = "what is 3 plus 4"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def served(files):
    options = options_of(*files, "--max-cpu-loras", "6", "--max-queue", "40")
    with live(options, admin_key="admin", ping=0.05) as found:
        found.programs = found.server.engine.compiled_programs
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(served):
    """After each test no row, lease or job is left, and nothing was compiled."""
    yield
    served.settled()
    assert served.server.engine.compiled_programs == served.programs


@pytest.fixture(scope="module")
def expected(files):
    """Greedy tokens of the base and of merged adapters, from plain engines."""
    source, root = files
    model = formats.load(source)
    tokens = formats.load_tokenizer(source)(PROMPT).input_ids
    engine = Engine(model, rows=1, max_length=40)
    found = {}
    for name in (BASE, *NAMES):
        params = model.params
        if name != BASE:
            params = merged(model, *formats.read_adapter(root / name, model.params)).params
        engine.use(params)
        (answer,) = engine.answer([Request(tokens, 8)])
        found[name] = answer.tokens
    assert len({*map(tuple, found.values())}) > 5
    return found


def complete(served, model, **more):
    return served.ok(COMPLETE, model=model, prompt=PROMPT, return_token_ids=True, **GREEDY, **more)


def test_every_model_answers_as_its_merged_weights(served, expected):
    for model in [*NAMES, BASE, *reversed(NAMES)]:
        answer = complete(served, model)
        (choice,) = answer["choices"]
        assert choice["token_ids"] == expected[model]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        assert answer["model"] == model and answer["object"] == "text_completion"
        assert answer["usage"] == {
            "prompt_tokens": 16,
            "completion_tokens": 8,
            "total_tokens": 24,
        }
    assert complete(served, f"{BASE}:a3")["choices"][0]["token_ids"] == expected["a3"]
    assert complete(served, "a3*1")["choices"][0]["token_ids"] == expected["a3"]


def test_fingerprints_tell_versions_apart(served):
    prints = {complete(served, model)["system_fingerprint"] for model in (BASE, "a1", "a2")}
    assert len(prints) == 3


def test_unknown_models_are_never_the_base(served):
    for model in ("nothing", f"{BASE}:nothing", "a1*0.5+nothing*0.5", "TINY"):
        for path, more in ((COMPLETE, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
            error = served.refused(path, 404, model=model, **more)
            assert error["code"] == "model_not_found" and error["param"] == "model"
    for model in ("a1*", "a1+", "+a1", "a1**2", "a1*x", "a1*1e999+", ""):
        assert served.post(COMPLETE, model=model, prompt="a").status_code in (400, 404)
    assert "weighted sum" in served.refused(COMPLETE, model="a1*0.5-a2", prompt="a")["message"]


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_what_is_not_supported_is_refused_by_name(served, path):
    body = {"prompt": "a"} if path == COMPLETE else {"messages": HELLO}
    fields = {
        **dict.fromkeys(("lora_path", "adapters", "adapter_id", "lora"), "a1"),
        **{"suffix": "x", "best_of": 2, "use_beam_search": True, "unknown_field": 1},
        **{"response_format": {"type": "xml"}, "structured_outputs": {}},
        **{"n": 0, "temperature": -1, "top_p": 0, "max_tokens": -5, "seed": 2**70},
        **{"min_p": 2, "presence_penalty": 9, "logit_bias": {"x": 1}, "stop": [""]},
        **{"temperature": "hot", "stream": 1, "stop_token_ids": ["a"], "prompt_logprobs": 99},
        **{"stream_options": {"include_usage": True}, "logit_bias": {"99999": 1}},
        **{"logprobs": 99 if path == COMPLETE else 3},
    }
    for name, value in fields.items():
        error = served.refused(path, model=BASE, **body, **{name: value})
        assert name in error["message"], (name, error)
        assert error["type"] == "invalid_request_error"
    for name in ("lora_path", "adapters"):
        assert "`model`" in served.refused(path, model=BASE, **body, **{name: "a"})["message"]
    given = {name: None for name in fields} | {"user": "me", "metadata": {}}
    served.ok(path, model=BASE, **body, **{**given, "max_tokens": 2})


def test_bodies_that_are_no_request(served):
    for body in (b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"model": 3}', b"{}"):
        response = served.client.post(COMPLETE, content=body)
        assert response.status_code == 400 and response.json()["error"]["message"], body
    for prompt in ("", [], [[]], [1.5], [True], {"a": 1}, ["a", 1], [-1], [10**9], [[1], ["a"]]):
        served.refused(COMPLETE, model=BASE, prompt=prompt, max_tokens=2)
    assert served.get("/v1/nothing").status_code == 404
    assert served.get(COMPLETE).status_code == 405
    assert served.refused(COMPLETE, model=BASE, prompt="a" * 119, max_tokens=20)["message"]


def test_prompts_choices_and_seeds(served):
    answer = served.ok(
        COMPLETE, model="a1", prompt=["ab", "cd"], n=3, max_tokens=6, seed=7, temperature=1
    )
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [*range(6)] and len({*texts}) > 3
    alone = served.ok(COMPLETE, model="a1", prompt="cd", n=3, max_tokens=6, seed=7, temperature=1)
    assert [choice["text"] for choice in alone["choices"]] == texts[3:]
    other = served.ok(COMPLETE, model="a1", prompt="cd", n=3, max_tokens=6, temperature=1)
    assert [choice["text"] for choice in other["choices"]] != texts[3:]
    ids = served.ok("/tokenize", prompt="cd")["tokens"]
    by_ids = served.ok(
        COMPLETE, model="a1", prompt=[ids, ids], n=3, max_tokens=6, seed=7, temperature=1
    )
    assert [choice["text"] for choice in by_ids["choices"][:3]] == texts[3:]


def test_scores_are_those_of_the_engine(served, files):
    """As lm-eval asks for them: the prompt is echoed, with the log-probability of each token."""
    source, root = files
    model = formats.load(source)
    adapted = merged(model, *formats.read_adapter(root / "a2", model.params))
    ids = served.ok("/tokenize", prompt="the answer is 12")["tokens"]
    engine = Engine(adapted, rows=1, max_length=40)
    (own,) = engine.answer([Request(ids, 1, log_probs=1, prompt_log_probs=1)])
    for most in (1, 0):
        answer = served.ok(
            COMPLETE,
            model="a2",
            prompt=[ids],
            max_tokens=most,
            temperature=0,
            logprobs=1,
            echo=True,
            seed=1234,
            ignore_eos=True,
        )
        found = answer["choices"][0]["logprobs"]
        values = found["token_logprobs"]
        assert values[0] is None and len(values) == len(ids) + most
        assert np.abs(np.array(values[1 : len(ids)]) - own.prompt_log_probs.own).max() < 1e-4
        for token, value, top in list(
            zip(found["tokens"], values, found["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == value and 1 <= len(top) <= 2
        pairs = zip(values[1:], found["top_logprobs"][1:], strict=True)
        greedy = [max(top.values()) == value for value, top in pairs]
        likely = own.prompt_log_probs.top_ids[:, 0] == np.array(ids[1:])
        assert greedy[: len(ids) - 1] == likely.tolist()
        assert all(greedy[len(ids) - 1 :])
        offsets = found["text_offset"]
        assert offsets[0] == 0 and offsets[5] == 5
        assert answer["choices"][0]["text"].startswith("the answer is 12")


def test_log_probabilities_are_never_dropped(served):
    for count in (0, 3):
        answer = complete(served, "a1", logprobs=count)
        found = answer["choices"][0]["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == 8
        assert all(1 <= len(top) <= count + 1 for top in found["top_logprobs"])
    answer = served.ok(CHAT, model="a1", messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8 and all(len(one["top_logprobs"]) == 2 for one in content)
    for one in content:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"]
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
    answer = complete(served, "a1", prompt_logprobs=1)
    found = answer["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == 16 and answer["choices"][0]["logprobs"] is None
    assert all(len(one) in (1, 2) for one in found[1:])


def test_a_stop_token_counts(served):
    plain = complete(served, "a1")["choices"][0]["token_ids"]
    at = plain.index(plain[5])
    answer = complete(served, "a1", stop_token_ids=[plain[5]], logprobs=1)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == plain[5]
    assert choice["token_ids"] == plain[: at + 1]
    assert answer["usage"]["completion_tokens"] == at + 1 == len(choice["logprobs"]["tokens"])


def test_stop_strings(served):
    text = complete(served, "a4")["choices"][0]["text"]
    stop = text[3:5]
    at = text.index(stop)
    (choice,) = complete(served, "a4", stop=stop)["choices"]
    assert choice["text"] == text[:at] and choice["stop_reason"] == stop
    kept = {"stop": ["\0", stop], "include_stop_str_in_output": True}
    (choice,) = complete(served, "a4", **kept)["choices"]
    assert choice["text"] == text[:at] + stop and choice["finish_reason"] == "stop"
    pieces = served.events(COMPLETE, model="a4", prompt=PROMPT, stop=stop, **GREEDY)
    assert "".join(one["choices"][0]["text"] for one in pieces) == text[:at]


@pytest.mark.parametrize("usage", [True, False])
def test_streams_of_completions(served, expected, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = served.events(
        COMPLETE,
        model="a5",
        prompt=[PROMPT, PROMPT],
        return_token_ids=True,
        logprobs=0,
        **GREEDY,
        **options,
    )
    last = chunks.pop() if usage else None
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert sum((choice["token_ids"] for choice in own), []) == expected["a5"]
        assert sum((len(choice["logprobs"]["tokens"]) for choice in own), 0) == 8
        assert [choice["finish_reason"] for choice in own][-1] == "length"
        assert not any(choice["finish_reason"] for choice in own[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    if last is not None:
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
        assert all(chunk["usage"] is None for chunk in chunks)


def test_streams_of_conversations(served):
    whole = served.ok(CHAT, model="a5", messages=HELLO, n=2, seed=3, max_tokens=12)
    chunks = served.events(
        CHAT,
        model="a5",
        messages=HELLO,
        n=2,
        seed=3,
        max_tokens=12,
        stream_options={"include_usage": True},
    )
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    for index in range(2):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(one["delta"].get("content", "") for one in own)
        assert text == whole["choices"][index]["message"]["content"]
        reasons = [one["finish_reason"] for one in own]
        assert reasons[-1] == whole["choices"][index]["finish_reason"] and not any(reasons[:-1])
        assert own[-1]["delta"] == {}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_templates_and_stops_are_the_adapters_own(served):
    """The rendered text as a completion has the same tokens."""
    bodies = {
        "own": "[hello]!",
        "a1": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    }
    for model, text in bodies.items():
        chat = served.ok(CHAT, model=model, messages=HELLO, return_token_ids=True, **GREEDY)
        plain = served.ok(COMPLETE, model=model, prompt=text, return_token_ids=True, **GREEDY)
        mine, other = chat["choices"][0], plain["choices"][0]
        assert mine["prompt_token_ids"] == other["prompt_token_ids"]
        assert mine["token_ids"] == other["token_ids"]
    assert 200 in served.server.store._names["own"].version.texts.stops
    assert 200 not in served.server.store._names["a1"].version.texts.stops
    info = served.get("/tokenizer_info", params={"model": "own"}).json()
    assert info["chat_template"].startswith("{% for m in messages %}[")
    assert served.get("/v1/tokenizer_info").json()["eos_token"] == "<|im_end|>"


def test_conversations(served):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    of_parts = [{"role": "user", "content": parts}]
    assert say(served, of_parts) == say(served, HELLO)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert say(served, HELLO, tools=[tool], tool_choice="none") == say(served, HELLO)
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    ids = prompt_ids(served, begun, continue_final_message=True)
    text = served.ok("/v1/detokenize", tokens=ids)["prompt"]
    assert text.endswith("<|im_start|>assistant\nWell")
    assert not served.ok(
        "/detokenize", tokens=prompt_ids(served, HELLO, add_generation_prompt=False)
    )["prompt"].endswith("assistant\n")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for messages, more, words in (
        (image, {}, "image_url"),
        ([], {}, "messages"),
        ([{"role": "user"}], {}, "content"),
        ([{"role": "king", "content": "a"}], {}, "king"),
        (HELLO, {"tools": [tool]}, "tool_choice"),
        (HELLO, {"tools": [tool], "tool_choice": "auto"}, "tool_choice"),
        (HELLO, {"chat_template": "{{ 1 }}"}, "chat_template"),
        (HELLO, {"top_logprobs": 2}, "top_logprobs"),
        (HELLO, {"continue_final_message": True}, "continue_final_message"),
        (begun, {"continue_final_message": True, "add_generation_prompt": True}, "not together"),
        (HELLO, {"max_completion_tokens": 0}, "max_tokens"),
    ):
        error = served.refused(CHAT, model="a1", messages=messages, **more)
        assert words in error["message"], error


def say(served, messages, **more):
    answer = served.ok(CHAT, model="a1", messages=messages, **GREEDY, **more)
    return answer["choices"][0]["message"]["content"]


def prompt_ids(served, messages, **more):
    body = {"model": "a1", "messages": messages, "return_token_ids": True, **GREEDY, **more}
    return served.ok(CHAT, **body)["choices"][0]["prompt_token_ids"]


def test_a_template_that_loops_is_stopped(served):
    for _ in range(2):
        error = served.refused(CHAT, model="loop", messages=HELLO)
        assert "adapter 'loop'" in error["message"] and "template" in error["message"]
    served.ok(CHAT, model="a1", messages=HELLO, max_tokens=2)


def test_tokens_and_texts(served):
    found = served.ok("/tokenize", prompt="héllo")
    assert found["count"] == len(found["tokens"]) == 6 and found["max_model_len"] == 120
    assert served.ok("/v1/detokenize", tokens=found["tokens"])["prompt"] == "héllo"
    assert "tokens" in served.refused("/detokenize", tokens=[10**6])["message"]
    served.refused("/tokenize", 404, prompt="a", model="nothing")


def test_split_characters_are_held_back(served):
    """Tokens are bytes here: no chunk has half a character."""
    chunks = served.events(
        COMPLETE, model="a6", prompt=PROMPT, max_tokens=60, temperature=2, seed=1
    )
    whole = served.ok(COMPLETE, model="a6", prompt=PROMPT, max_tokens=60, temperature=2, seed=1)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]


def test_models_are_listed(served):
    complete(served, "a1")
    cards = {card["id"]: card for card in served.get("/v1/models").json()["data"]}
    assert {*cards} == {BASE, *NAMES, "own", "loop"}
    assert cards[BASE]["parent"] is None and cards["a1"]["parent"] == BASE
    one = served.get("/v1/models/a1").json()
    assert one == cards["a1"] and one["resident"] == "device" and len(one["revision"]) == 64
    assert one["rank"] == 4 and one["max_model_len"] == 120 and one["root"] == "a1"
    assert served.get(f"/v1/models/{BASE}").json()["id"] == BASE
    assert served.get("/v1/models/nothing").status_code == 404
    for path in ("..", "a1%2f..%2f..", "%2e%2e/x"):
        assert served.get(f"/v1/models/{path}").status_code in (400, 404)


ADMIN = {"authorization": "Bearer admin"}


def test_adapters_are_loaded_replaced_and_unloaded(served, expected, files):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    given = {"lora_name": "x", "lora_path": "a2", "headers": ADMIN}
    first = served.ok(load, **given)
    assert complete(served, "x")["choices"][0]["token_ids"] == expected["a2"]
    assert "load_inplace" in served.refused(load, **given)["message"]
    second = served.ok(load, **{**given, "lora_path": "a3", "load_inplace": True, "pinned": True})
    assert second["revision"] != first["revision"] and second["pinned"]
    assert complete(served, "x")["choices"][0]["token_ids"] == expected["a3"]
    served.ok(unload, lora_name="x", headers=ADMIN)
    served.refused(COMPLETE, 404, model="x", prompt="a")
    served.refused(unload, 404, lora_name="x", headers=ADMIN)
    for path in ("absent", "../root/../tiny", "/etc", str(files[0]), ""):
        error = served.refused(load, 404, lora_name="y", lora_path=path, headers=ADMIN)
        assert error["param"] == "lora_path"
    for name in ("../a", "a/b", "", "x" * 200, BASE + ":a"):
        served.refused(load, lora_name=name, lora_path="a1", headers=ADMIN)
    assert str(files[1]) not in served.get("/v1/models").text


def test_a_replaced_adapter_ends_what_it_began(served, expected):
    """A stream goes on with the old weights while new requests have the new ones."""
    load = "/v1/load_lora_adapter"
    served.ok(load, lora_name="y", lora_path="a6", headers=ADMIN)
    body = {"model": "y", "prompt": PROMPT, **GREEDY, "max_tokens": 60, "stream": True}
    whole = served.ok(COMPLETE, **{**body, "stream": False})["choices"][0]["text"]
    with served.client.stream("POST", COMPLETE, json=body) as stream:
        lines = stream.iter_lines()
        text = next(line for line in lines if line.startswith("data: "))
        served.ok(load, lora_name="y", lora_path="a7", load_inplace=True, headers=ADMIN)
        assert complete(served, "y")["choices"][0]["token_ids"] == expected["a7"]
        rest = [line for line in lines if line.startswith("data: {")]
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in [text, *rest]]
    assert "".join(texts) == whole


def test_the_log_has_one_line_per_request(served, capfd):
    served.get("/v1/a%0aGET%20/fake%200.00 s%c3%a9")
    until(lambda: "fake" in (lines := capfd.readouterr().err) and lines.count("\n") == 1)


def test_keys(files, served):
    load = {"lora_name": "z", "lora_path": "a1"}
    served.refused("/v1/load_lora_adapter", 401, **load)
    served.refused("/v1/unload_lora_adapter", 401, lora_name="a1", headers={"authorization": "x"})
    app = type(served.app)(served.app.settings.__class__(BASE, api_key="key", max_body=1000))
    app.start(served.server)
    with listening(app) as url, httpx.Client(base_url=url) as client:
        body = {"model": BASE, "prompt": "a", "max_tokens": 2}
        assert client.get("/health").status_code == 200 == client.get("/").status_code
        for path in ("/v1/models", "/metrics", "/tokenizer_info"):
            assert client.get(path).status_code == 401
        for key in ("", "Bearer", "Bearer no", "Bearer kéy".encode(), "Basic key", "key"):
            response = client.post(COMPLETE, json=body, headers={"authorization": key})
            assert response.status_code == 401
        key = {"authorization": "Bearer key", "x-request-id": "my-id"}
        response = client.post(COMPLETE, json=body, headers=key)
        assert response.status_code == 200 and response.headers["x-request-id"] == "my-id"
        response = client.post("/v1/load_lora_adapter", json=load, headers=key)
        assert response.status_code == 403 and "--admin-key" in response.text
        for sent in ({**body, "prompt": "a" * 2000}, (b"x" for _ in range(3000))):
            more = {"json": sent} if isinstance(sent, dict) else {"content": sent}
            assert client.post(COMPLETE, headers=key, **more).status_code == 413
        odd = client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
        assert odd != "a b" and len(odd) == 32


def test_a_full_queue(served):
    """429 with Retry-After, and the others are answered."""
    codes, answers = [], []

    def work():
        response = httpx.post(
            f"{served.url}{COMPLETE}",
            json={"model": BASE, "prompt": "a", "n": 30, "max_tokens": 30, "ignore_eos": True},
            timeout=120,
        )
        codes.append(response.status_code)
        answers.append(response)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*codes} == {200, 429}
    full = next(response for response in answers if response.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1 and "try again" in full.text
    assert "queue" in served.refused(COMPLETE, model=BASE, prompt="a", n=100)["message"]


def test_clients_that_go_free_their_rows(served):
    body = {"model": "a1", "prompt": PROMPT, "max_tokens": 90, "ignore_eos": True}
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            with served.client.stream(
                "POST", COMPLETE, json={**body, "stream": stream}, timeout=0.15
            ) as response:
                for _ in response.iter_bytes():
                    raise httpx.ReadTimeout("the client has seen enough")
        served.settled()


def test_an_error_inside_a_stream(served, monkeypatch):
    import lora_jax.serve.answers as answers

    def fail(*arguments):
        raise RuntimeError("secret")

    monkeypatch.setattr(answers.Form, "last_chunks", fail)
    (*_, last) = served.events(COMPLETE, model=BASE, prompt="a", max_tokens=2)
    assert last["error"]["message"].startswith("internal error") and "secret" not in str(last)


def test_time_limit(files, served):
    app = type(served.app)(served.app.settings.__class__(BASE, timeout=0.01))
    app.start(served.server)
    with listening(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        body = {"model": "a1", "prompt": PROMPT, "max_tokens": 90, "ignore_eos": True}
        response = client.post(COMPLETE, json=body)
        assert response.status_code == 503 and response.json()["error"]["code"] == "timeout"


def test_pings_keep_a_stream_open(served, monkeypatch):
    original = served.server.engine.step

    def slow():
        threading.Event().wait(0.15)
        return original()

    monkeypatch.setattr(served.server.engine, "step", slow)
    body = {"model": BASE, "prompt": "a", "max_tokens": 20, "ignore_eos": True, "stream": True}
    with served.client.stream("POST", COMPLETE, json=body) as response:
        lines = list(response.iter_lines())
    assert any(line.startswith(": ping") for line in lines)


def test_while_it_starts_and_drains(served):
    app = type(served.app)(served.app.settings)
    with listening(app) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.get("/health").status_code == 503
            response = client.post(COMPLETE, json={"model": BASE, "prompt": "a"})
            assert response.status_code == 503 and "start" in response.text
        app.start(served.server)
        assert client.get("/health").status_code == 200
        app.drain()
        assert client.get("/health").status_code == 503
        assert "shutting down" in client.get("/v1/models").text


def test_metrics(served):
    complete(served, "a1")
    text = served.get("/metrics").text
    for name in (
        *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
        *("vllm:lora_requests_info", "lora_jax_adapter_loads_total", "compiled_programs_total"),
        *("lora_jax_adapter_evictions_total", "lora_jax_host_adapters"),
        *('lora_jax_time_to_first_token_seconds_count{adapter="a1"}',),
        *('lora_jax_requests_total{status="200"}',),
    ):
        assert name in text, name
    for number in range(300):
        served.app.metrics.label(f"name-{number}")
    assert served.app.metrics.label("one more") == "others"


def test_bad_adapters_are_refused_while_others_answer(served, files):
    root = files[1]
    (root / "broken").mkdir(exist_ok=True)
    (root / "broken" / "adapter_config.json").write_text("{")
    error = served.refused(COMPLETE, model="broken", prompt="a")
    assert "adapter 'broken'" in error["message"] and str(root) not in error["message"]
    card = served.get("/v1/models/broken")
    assert card.status_code == 400 and "adapter 'broken'" in card.text
    assert str(root) not in card.text and served.get("/v1/models").status_code == 200
    model = formats.load(files[0])
    write_adapter(model, root / "other", 1)
    side = root / "other" / "lora_jax.json"
    content = json.loads(side.read_text()) | {"fingerprint": {"base": "sha256:x"}}
    side.write_text(json.dumps(content))
    assert "base" in served.refused(COMPLETE, model="other", prompt="a")["message"]
    complete(served, "a1")
    for name in ("broken", "other"):
        for file in (root / name).iterdir():
            file.unlink()
        (root / name).rmdir()


@pytest.mark.parametrize("requests", [120, pytest.param(600, marks=pytest.mark.slow)])
def test_many_clients_get_what_each_gets_alone(served, requests):
    """32 threads, 8 adapters; some go away in the middle."""
    rng = np.random.default_rng(requests)
    bodies = [
        {
            "model": str(rng.choice([*NAMES, "a1*0.5+a2*0.5"])),
            "prompt": PROMPT[: int(rng.integers(1, 16))],
            "max_tokens": int(rng.integers(1, 20)),
            "temperature": float(rng.choice([0, 1])),
            "seed": int(rng.integers(5)),
        }
        for _ in range(24)
    ]
    alone = [served.ok(COMPLETE, **body)["choices"][0]["text"] for body in bodies]
    draws = iter(rng.integers(0, 24, requests).tolist())
    goes = set(rng.integers(0, requests, requests // 6).tolist())
    lock, wrong = threading.Lock(), []

    def work():
        with httpx.Client(base_url=served.url, timeout=120) as client:
            while True:
                with lock:
                    index = next(draws, None)
                    leaves = len(goes) and goes.pop() % 3 == 0
                if index is None:
                    return
                body = bodies[index]
                if leaves:
                    long = {**body, "stream": True, "max_tokens": 60, "ignore_eos": True}
                    with client.stream("POST", COMPLETE, json=long) as response:
                        next(response.iter_bytes(), None)
                    continue
                response = client.post(COMPLETE, json=body)
                if response.status_code == 429:
                    continue
                if response.json()["choices"][0]["text"] != alone[index]:
                    wrong.append((body, response.text))

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    served.settled()
    until(lambda: served.server.store.host[0] <= 6)
