"""Requests as they arrive: fields with their types, as in OpenAI's and vLLM's interfaces.

A field that is not known is refused by name, as is one that is known and not supported: nothing is
ignored in silence. A field that is null is as if absent.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from lora_jax.errors import UserError
from lora_jax.generate.sampling import Sampling
from lora_jax.serve.errors import ApiError, refused

MOST_CHOICES = 128
# Fields of OpenAI's clients that change no answer.
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_REFUSED = {
    **dict.fromkeys(("suffix", "best_of", "use_beam_search", "prompt_embeds"), "not supported"),
    **dict.fromkeys(
        ("lora_path", "adapters", "adapter_id", "lora", "lora_request", "lora_name"),
        "name the adapter in `model`",
    ),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "use structured_outputs",
    ),
    **dict.fromkeys(("chat_template",), "the template is that of the adapter, or of the base"),
    **dict.fromkeys(("functions", "function_call"), "give tools, with tool_choice: none"),
    **dict.fromkeys(
        ("bad_words", "allowed_token_ids", "truncate_prompt_tokens", "cache_salt", "priority"),
        "not supported",
    ),
}
_LEFT_OUT = {*_REFUSED, *_HARMLESS}
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_PLACE = re.compile(r"at `\$\.?([^`]*)`")


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool = False


class Sampled(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of requests."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    def sampling(self, seed: int) -> Sampling:
        """Return the settings of a row.

        Raises:
            UserError: values out of range.
        """
        try:
            bias = {int(token): value for token, value in self.logit_bias.items()}
        except ValueError:
            raise refused("logit_bias", "its keys must be token ids") from None
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias,
            min_new_tokens=self.min_tokens,
        )


class CompletionRequest(Sampled, kw_only=True):
    """The body of /v1/completions."""

    prompt: Any
    max_tokens: int | None = None
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatRequest(Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str | None = None


class LoadRequest(Struct, forbid_unknown_fields=True):
    """The body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pinned: bool = False


class UnloadRequest(Struct, forbid_unknown_fields=True):
    """The body of /v1/unload_lora_adapter."""

    lora_name: str


T = TypeVar("T")


def parse(body: bytes, kind: type[T]) -> T:
    """Return the request in a body.

    Raises:
        ApiError: 400 with the field: not JSON, unknown, refused, or of a wrong type.
    """
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(content, Mapping):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    given = {name: value for name, value in content.items() if value is not None}
    sampled = issubclass(kind, Sampled)
    if sampled:
        _check_supported(given)
        given = {name: value for name, value in given.items() if name not in _LEFT_OUT}
    try:
        return msgspec.convert(given, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text = str(error)
        found = _UNKNOWN.search(text) or _PLACE.search(text)
        param = found[1] if found else None
        if "missing required field" in text:
            param = text.split("`")[1]
        raise ApiError(400, f"{param or 'the body'}: {text}", param=param) from error


def _check_supported(given: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if name in given and not _is_off(name, given[name]):
            raise refused(name, why)
    if given.get("tools") and given.get("tool_choice") != "none":
        raise refused(
            "tool_choice",
            "tools are shown to the template, and calls are not parsed: set tool_choice to none",
        )


def _is_off(name: str, value: Any) -> bool:
    """Return True for a value that asks for nothing, as clients send by default."""
    return value is False or (name == "best_of" and value == 1)


def check_counts(request: Sampled) -> None:
    """Check fields whose limits are those of the interface.

    Raises:
        ApiError: 400 with the field.
    """
    if not 1 <= request.n <= MOST_CHOICES:
        raise refused("n", f"must be from 1 to {MOST_CHOICES}")
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "only with stream: true")
    if request.seed is not None and not -(2**63) <= request.seed < 2**64:
        raise refused("seed", "must be a 64-bit integer")
    if not isinstance(request.stop, str) and len(request.stop) > 64:
        raise refused("stop", "has more than 64 strings")
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        value = getattr(request, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= 20:
            raise refused(name, "must be from 0 to 20")
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, name, None)
        if value is not None and value < 0:
            raise refused(name, "must not be negative")


def prompts_of(value: Any) -> list[str] | list[list[int]]:
    """Return the prompts of a request: texts, or lists of token ids.

    Raises:
        ApiError: 400 for anything else.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(one, list) and one and _are_ids(one) for one in value):
            return value
    raise refused("prompt", "must be a text, a list of texts, token ids, or lists of token ids")


def _are_ids(value: list) -> bool:
    return all(type(one) is int for one in value)


def as_refusal(error: UserError) -> ApiError:
    """Return the 400 of an error in the engine's words, with the field that it names."""
    text = str(error)
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    for engine, own in names.items():
        text = text.replace(engine, own)
    text = text.replace("max_length", "max_model_len")
    name = re.match(r"([a-z_]+)[=:]", text)
    return ApiError(400, text, param=name[1] if name else None)
