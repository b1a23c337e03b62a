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


def integers(least, most):
    return {"type": "integer", "minimum": least, "maximum": most}


def numbers(least, most):
    return {"type": "number", "minimum": least, "maximum": most}


def lists(item, most=4, least=0):
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def objects(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required)}


TEXT = {"type": "string", "maxLength": 20}
SOME_TEXT = {**TEXT, "minLength": 1}
TOKEN = integers(0, 258)
PART = objects(("type", "text"), type={"const": "text"}, text=TEXT)
TOOL = objects(("type", "function"), type={"const": "function"}, function={"type": "object"})
# Narrower than their types, so that most requests are answered; others are made of these.
FIELDS = {
    "model": {"enum": MODELS},
    "prompt": {
        "anyOf": [SOME_TEXT, lists(SOME_TEXT, 3, 1), lists(TOKEN, 20, 1)]
        + [lists(lists(TOKEN, 20, 1), 3, 1)]
    },
    "messages": lists(
        objects(
            ("role", "content"),
            role={"enum": ("system", "user", "assistant", "tool")},
            content={"anyOf": [TEXT, lists(PART, 3, 1)]},
        ),
        least=1,
    ),
    "n": integers(1, 3),
    "max_tokens": {"anyOf": [integers(1, 16), {"type": "null"}]},
    "max_completion_tokens": integers(1, 16),
    "min_tokens": integers(0, 1),
    "temperature": numbers(0, 3),
    "top_p": numbers(0.01, 1),
    "top_k": integers(-1, 300),
    "min_p": numbers(0, 1),
    "seed": integers(-(2**63), 2**64 - 1),
    "stop": {"anyOf": [SOME_TEXT, lists(SOME_TEXT)]},
    "stop_token_ids": lists(TOKEN),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,2}$"},
        "additionalProperties": numbers(-100, 100),
    },
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
    "repetition_penalty": numbers(0.1, 2),
    "prompt_logprobs": integers(0, 20),
    "top_logprobs": integers(0, 20),
    "tools": lists(TOOL, 2),
    "tokens": lists(TOKEN, 50),
    "lora_name": {"enum": ("x", "y", "a7", "tiny")},
    "lora_path": {"enum": ("a1", "a2", "absent", "../tiny", "")},
}


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
        schema = {"$ref": template.format(name=kind.__name__)}
        content = {"application/json": {"schema": schema}}
        paths[path] = {"post": {**answers, "requestBody": {"required": True, "content": content}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lora-jax serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": parts},
    }
