"""An OpenAPI description of the routes, from the bodies that the server reads."""

import msgspec

from lora_jax.serve import protocol

BODIES = {
    "/v1/completions": protocol.CompletionRequest,
    "/v1/chat/completions": protocol.ChatRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/v1/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
    "/v1/detokenize": protocol.DetokenizeRequest,
    "/v1/load_lora_adapter": protocol.LoadRequest,
    "/v1/unload_lora_adapter": protocol.UnloadRequest,
}
MODELS = ("tiny", "tiny:a1", "a1", "own", "a2*0.5", "a1*0.5+a2*-0.5", "nothing")
NAME = {"name": "name", "in": "path", "required": True, "schema": {"enum": MODELS}}
MODEL = {"name": "model", "in": "query", "schema": {"enum": MODELS}}
READ = {
    **dict.fromkeys(("/", "/health", "/metrics", "/v1/models"), ()),
    "/v1/models/{name}": (NAME,),
    **dict.fromkeys(("/tokenizer_info", "/v1/tokenizer_info"), (MODEL,)),
}


def numbers(least, most):
    return {"type": "number", "minimum": least, "maximum": most}


def lists(item, most=4, least=0):
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def objects(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required)}


TEXT = {"type": "string", "maxLength": 8}
SOME_TEXT = {**TEXT, "minLength": 1}
TOKEN = {"enum": (0, 70, 100, 258)}
PART = objects(("type", "text"), type={"const": "text"}, text=TEXT)
TOOL = objects(("type", "function"), type={"const": "function"}, function={"type": "object"})
# Narrower than their types, so that most requests are answered; others are made of these. An
# integer of JSON may be 1.0, so that integers are listed.
FIELDS = {
    "model": {"enum": MODELS},
    "prompt": {
        "anyOf": [SOME_TEXT, lists(SOME_TEXT, 3, 1), lists(TOKEN, 8, 1)]
        + [lists(lists(TOKEN, 8, 1), 3, 1)]
    },
    "messages": lists(
        objects(
            ("role", "content"),
            role={"enum": ("system", "user", "assistant", "tool")},
            content={"anyOf": [TEXT, lists(PART, 3, 1)]},
        ),
        least=1,
    ),
    "n": {"enum": (1, 3)},
    "max_tokens": {"enum": (1, 3, 4, None)},
    "max_completion_tokens": {"enum": (1, 4)},
    "min_tokens": {"enum": (0, 1)},
    "temperature": numbers(0, 3),
    "top_p": numbers(0.01, 1),
    "top_k": {"enum": (-1, 0, 1, 7, 300)},
    "min_p": numbers(0, 1),
    "seed": {"enum": (0, 1, -(2**63), 2**64 - 1)},
    "stop": {"anyOf": [SOME_TEXT, lists(SOME_TEXT)]},
    "stop_token_ids": lists(TOKEN),
    "logit_bias": {"enum": ({}, {"70": 100}, {"0": -100, "258": 5.5})},
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
    "repetition_penalty": numbers(0.1, 2),
    "prompt_logprobs": {"enum": (0, 1, 20)},
    "top_logprobs": {"enum": (0, 1, 20)},
    "tools": lists(TOOL, 2),
    "tokens": lists(TOKEN, 50),
    "lora_name": {"enum": ("x", "y", "a7", "tiny")},
    "lora_path": {"enum": ("a1", "a2", "absent", "../tiny", "")},
}
SAMPLING = ("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
ENDS = ("max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids")
ENDS += ("include_stop_str_in_output", "skip_special_tokens")
STREAM = ("n", "max_tokens", "stop", "stream", "stream_options", "logprobs", "return_token_ids")
SCORES = ("max_tokens", "logprobs", "prompt_logprobs", "return_token_ids")
# Fields that a request has together: where all may be left out, most that are drawn have either
# very few or some that exclude each other.
GROUPS = {
    "CompletionRequest": (
        *(SAMPLING, PENALTIES, ENDS, STREAM, SCORES),
        (*SCORES, "echo", "add_special_tokens"),
        ("max_tokens", "stream", "echo", "logprobs"),
    ),
    "ChatRequest": (
        *(SAMPLING, PENALTIES, ENDS, STREAM, SCORES),
        (*STREAM, "top_logprobs"),
        ("max_completion_tokens", "logprobs", "top_logprobs"),
        ("max_tokens", "tools", "tool_choice", "parallel_tool_calls"),
        ("max_tokens", "chat_template_kwargs", "add_generation_prompt", "add_special_tokens"),
        ("max_tokens", "continue_final_message"),
    ),
}
# Schemas of fields in a group. Without some values the other fields are refused; the rest is short,
# since the whole body has more of them.
IN_GROUP = {
    "model": {"enum": ("a1", "tiny")},
    "prompt": {"const": "ab"},
    "messages": {
        "const": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "stream": {"const": True},
    "tool_choice": {"const": "none"},
}


def with_group(whole, fields):
    """The schema of bodies that have these fields and the required ones, and no others."""
    required = [*whole["required"], *fields]
    kept = {name: IN_GROUP.get(name, whole["properties"][name]) for name in required}
    if "logprobs" in kept:
        flag = whole["title"] == "ChatRequest"
        kept["logprobs"] = {"const": True} if flag else {"enum": (0, 1, 20)}
    return {**whole, "properties": kept, "required": required}


def description():
    """The document; the fields of a body are those of its class, `FIELDS` with narrower types."""
    template = "#/components/schemas/{name}"
    kinds = {kind.__name__: kind for kind in BODIES.values()}
    _, parts = msgspec.json.schema_components(kinds.values(), ref_template=template)
    for name in kinds:
        own = parts[name]["properties"]
        own.update({field: FIELDS[field] for field in own.keys() & FIELDS.keys()})
    answers = {"responses": {"default": {"description": "an answer or an error"}}}
    paths = {path: {"get": {**answers, "parameters": [*more]}} for path, more in READ.items()}
    for path, kind in BODIES.items():
        name = kind.__name__
        groups = [with_group(parts[name], fields) for fields in GROUPS.get(name, ())]
        schema = {"anyOf": [{"$ref": template.format(name=name)}, *groups]}
        content = {"application/json": {"schema": schema}}
        paths[path] = {"post": {**answers, "requestBody": {"required": True, "content": content}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lora-jax serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": parts},
    }
