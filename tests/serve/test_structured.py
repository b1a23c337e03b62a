"""Structured output: every answer, streamed or whole, is one of its grammar."""

import json
import re
import threading

import pytest

from .live import BASE, live, options_of, write_files

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["red", "blue"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SMALL = {"disable_any_whitespace": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def served(files):
    with live(options_of(*files), admin_key="admin") as found:
        found.programs = found.server.engine.compiled_programs
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(served):
    yield
    served.settled()
    assert served.server.engine.compiled_programs == served.programs


def is_person(text):
    found = json.loads(text)
    assert [*found] == ["name", "age", "kind"] and len(found["name"]) <= 6
    assert 0 <= found["age"] <= 130 and found["kind"] in ("red", "blue")
    return True


@pytest.mark.parametrize("model", [BASE, "a1", "own", "a1*0.5+a2*0.5"])
@pytest.mark.parametrize("seed", [1, 2])
def test_texts_are_those_of_the_grammar(served, model, seed):
    sampled = {"model": model, "temperature": 1.3, "seed": seed, "max_tokens": 80, "n": 2}
    choices = ["yes", "no, never", 'a "quoted"\nline \\', "日本"]
    lark = 'start: "<" word ("," word)* ">"\nword: /[ab]{2}/'
    for given, holds in (
        ({"json": PERSON, **SMALL}, is_person),
        ({"json": json.dumps(PERSON), **SMALL}, is_person),
        ({"regex": r"([0-9]{2}-){3}[x-z]"}, re.compile(r"([0-9]{2}-){3}[x-z]").fullmatch),
        ({"choice": choices}, choices.__contains__),
        ({"grammar": lark}, re.compile("<[ab]{2}(,[ab]{2})*>").fullmatch),
    ):
        answer = served.ok(COMPLETE, prompt="who?", structured_outputs=given, **sampled)
        talk = served.ok(CHAT, messages=HELLO, structured_outputs=given, **sampled)
        texts = [choice["text"] for choice in answer["choices"]]
        texts += [choice["message"]["content"] for choice in talk["choices"]]
        reasons = [one["finish_reason"] for one in (*answer["choices"], *talk["choices"])]
        for text, reason in zip(texts, reasons, strict=True):
            if "grammar" in given and reason == "length":
                continue  # it may be long
            assert reason == "stop" and holds(text), (given, text)


def test_openais_formats(served):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    asked = {"model": "a2", "messages": HELLO, "max_tokens": 90, "temperature": 1.3, "seed": 0}
    # Random weights fill the answer with white space, which JSON allows.
    spaces = {
        token for text in " \t\r\n" for token in served.ok("/tokenize", prompt=text)["tokens"]
    }
    asked["logit_bias"] = dict.fromkeys(map(str, spaces), -100)
    choices = served.ok(CHAT, response_format=schema, n=3, **asked)["choices"]
    assert all(is_person(one["message"]["content"]) for one in choices)
    events = served.events(CHAT, response_format=schema, **asked)
    deltas = [event["choices"][0]["delta"] for event in events]
    text = "".join(one.get("content") or "" for one in deltas)
    assert text == choices[0]["message"]["content"]
    text = served.ok(CHAT, response_format={"type": "json_object"}, **asked)["choices"][0]
    assert text["message"]["content"].lstrip().startswith("{")
    free = served.ok(CHAT, response_format={"type": "text"}, **asked)["choices"][0]
    assert free == served.ok(CHAT, **asked)["choices"][0]


def test_an_answer_is_the_likeliest_text_that_is_allowed(served):
    """Of two words of one token each, the one whose log-probability is higher."""
    asked = {"model": "a1", "prompt": "who?", "temperature": 0, "max_tokens": 4}
    scores = {}
    for word in "xyz":
        scored = served.ok(
            COMPLETE, **{**asked, "prompt": f"who?{word}", "max_tokens": 0}, echo=True, logprobs=1
        )
        scores[word] = scored["choices"][0]["logprobs"]["token_logprobs"][-1]
    answer = served.ok(COMPLETE, **asked, structured_outputs={"regex": "[xyz]"}, logprobs=3)
    (choice,) = answer["choices"]
    assert choice["text"] == max(scores, key=scores.get) and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([max(scores.values())], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 1


def test_neighbours_do_not_notice(served):
    plain = {"model": "a3", "prompt": "what is 3 plus 4", "max_tokens": 20, "temperature": 0}
    alone = served.ok(COMPLETE, **plain)["choices"]
    kept = {
        "model": "a3",
        "prompt": "what",
        "max_tokens": 60,
        "structured_outputs": {"json": PERSON, **SMALL},
    }
    found = {}

    def ask(number, body):
        found[number] = served.ok(COMPLETE, **body)["choices"]

    bodies = [plain, kept] * 5
    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(bodies)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(found[number] == alone for number in range(0, 10, 2))
    assert all(is_person(found[number][0]["text"]) for number in range(1, 10, 2))


def test_with_stops_limits_and_penalties(served):
    asked = {
        "model": BASE,
        "prompt": "a",
        "temperature": 0,
        "structured_outputs": {"regex": "(ab)+c"},
    }
    cut = served.ok(COMPLETE, **asked, max_tokens=3)["choices"][0]
    assert cut["finish_reason"] == "length" and re.fullmatch("(ab)*a?c?", cut["text"])
    stopped = served.ok(COMPLETE, **asked, max_tokens=30, stop="b")["choices"][0]
    assert (stopped["text"], stopped["stop_reason"]) == ("a", "b")
    more = {
        "presence_penalty": 2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "min_tokens": 6,
    }
    text = served.ok(COMPLETE, **asked, max_tokens=60, ignore_eos=True, **more)["choices"][0][
        "text"
    ]
    assert re.fullmatch("(ab)+c?", text)


REFUSED = {
    "an unknown kind": {"structural_tag": "{}"},
    "two kinds": {"regex": "a", "choice": ["b"]},
    "no kind": {},
    "a list that is empty": {"choice": []},
    "a list of numbers": {"choice": [1]},
    "a regular expression that is wrong": {"regex": "(("},
    "a grammar that is wrong": {"grammar": "start: missing"},
    "a schema that nothing meets": {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    "a schema that is no JSON": {"json": "{"},
    "a schema elsewhere": {"json": {"$ref": "http://localhost/schema"}},
    "a schema without an end": {"json": {"$ref": "#"}},
    "spaces of a regular expression": {"regex": "a", **SMALL},
    "a wrong type": {"regex": 3},
    "brackets without end": {"regex": "(" * 100_000 + "a" + ")" * 100_000},
    "a grammar of brackets": {"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000},
    "too many words": {"json": {"enum": [f"x{i}" for i in range(100_000)]}},
    "a schema of many levels": {"json": json.loads('{"items":' * 150 + "{}" + "}" * 150)},
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(served, given):
    error = served.refused(COMPLETE, model=BASE, prompt="a", structured_outputs=given)
    assert error["param"] == "structured_outputs" and len(error["message"]) < 400
    assert served.ok(COMPLETE, model=BASE, prompt="a", max_tokens=1)


@pytest.mark.parametrize(
    "given",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}},
        {"type": "json_schema", "json_schema": {"schema": 3}},
        {},
    ],
)
def test_formats_that_are_refused(served, given):
    error = served.refused(CHAT, model=BASE, messages=HELLO, response_format=given)
    assert error["param"] == "response_format"


def test_both_fields_at_once_are_refused(served):
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    error = served.refused(COMPLETE, model=BASE, prompt="a", **both)
    assert "not together" in error["message"]
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        error = served.refused(COMPLETE, model=BASE, prompt="a", **{name: "a"})
        assert "structured_outputs" in error["message"]


def test_a_grammar_that_becomes_too_complex_ends_its_request_with_an_error(served):
    given = {"regex": "((a{1000}){1000}){1000}"}
    response = served.post(
        COMPLETE, model=BASE, prompt="a", max_tokens=50, structured_outputs=given
    )
    assert response.status_code == 400 and "grammar" in response.json()["error"]["message"]
