"""Conversations to text: the settings, the source of the chat template, and rendering with it.

A chat template is a program written by others. Any exception that it raises is reported as a
refusal of the row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from lora_jax.config import expand, read_text, shown
from lora_jax.data.keys import RESERVED, reads
from lora_jax.data.rows import REASONING, SYSTEM_ROLES, Row
from lora_jax.data.sandbox import TemplateLimit
from lora_jax.data.sandbox import render as render_within_limits
from lora_jax.errors import UserError

PLAIN = "none"
_OPTIONS = (
    "data.chat_template is null for the tokenizer's own, the path of a Jinja file, "
    f"or {PLAIN!r} for prompt and completion joined unchanged"
)
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Rendering:
    """Settings that decide how a conversation is rendered and tokenised."""

    tokenizer: Any
    system_prompt: str | None = None  # put before rows that have no system turn
    chat_template: str | None = None  # None: the tokenizer's own; a Jinja file; "none": plain text
    # Arguments for the template; those of a row take precedence.
    chat_template_kwargs: Mapping[str, Any] | None = None
    template_date: str | None = None  # YYYY-MM-DD for templates that read the date; None: today


class RenderingOptions(TypedDict, total=False):
    """Fields of `Rendering` as keywords of functions that take the tokenizer separately."""

    system_prompt: str | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    template_date: str | None


# Sources


def resolve_template(
    tokenizer: Any, chat_template: str | None, tools: Sequence[dict[str, Any]] = ()
) -> str | None:
    """Return the source of the Jinja template, or None for plain text.

    Some tokenizers have a second template for conversations with tools.

    Raises:
        UserError: the file cannot be read, or the tokenizer has no template of its own.
    """
    if chat_template == PLAIN:
        return None
    if chat_template is not None:
        try:
            file = expand(chat_template, "data.chat_template")
            return read_text(file, f"data.chat_template={chat_template!r}")
        except UserError as error:
            raise UserError(f"{error}; {_OPTIONS}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer_name(tokenizer)} has no chat template; {_OPTIONS}"
        )
    try:
        return tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several templates and none of them the default
        reason = shown(str(error))
        raise UserError(
            f"the tokenizer of {tokenizer_name(tokenizer)}: {reason}; {_OPTIONS}"
        ) from error


def template_text(tokenizer: Any, chat_template: str | None) -> str:
    """Return one text for all templates in use. Conversations render alike if it is equal.

    It holds both templates of a tokenizer that has one for rows with tools and one for rows
    without. It is empty for a tokenizer without a template: plain texts and tokens need none.

    Raises:
        UserError: the file cannot be read.
    """
    if chat_template is not None:
        return resolve_template(tokenizer, chat_template) or PLAIN
    own = tokenizer.chat_template or ""
    return own if isinstance(own, str) else json.dumps(own, sort_keys=True)


def check_kwargs(rendering: Rendering) -> None:
    """Refuse arguments that the chat template never reads, and reserved ones.

    Raises:
        UserError: names all of them.
    """
    given = rendering.chat_template_kwargs
    if not given:
        return
    if reserved := sorted(RESERVED & {*given}):
        raise UserError(
            f"data.chat_template_kwargs cannot hold {', '.join(map(repr, reserved))}: rows and "
            "settings decide these; take it out"
        )
    chat_template = rendering.chat_template
    source = template_text(rendering.tokenizer, chat_template)
    plain = chat_template == PLAIN
    unread = [key for key in given if plain or not reads(source, key)]
    if unread:
        own = tokenizer_name(rendering.tokenizer)
        raise UserError(
            f"data.chat_template_kwargs names {', '.join(map(repr, unread))}, and the chat "
            f"template of {own if chat_template is None else repr(chat_template)} "
            "reads no such argument; take it out, or use another data.chat_template"
        )


# Text


def render(tokenizer: Any, source: str, row: Row, messages: Messages, **options: Any) -> str:
    """Render messages of a row, with the row's tools.

    Raises:
        UserError: the template raises.
    """
    given = {"tools": tools(row) or None, **row.chat_template_kwargs, **options}
    options = {**tokenizer.special_tokens_map, **given}
    texts, _ = _with_either_arguments(
        row,
        messages,
        lambda messages: render_within_limits(source, messages, **options),
    )
    return texts[0]


def render_marked(
    tokenizer: Any, source: str, row: Row, messages: Messages
) -> tuple[str, list[tuple[int, int]]]:
    """Render as `render` does, and return the character spans of {% generation %} blocks too.

    Raises:
        UserError: the template raises.
    """
    options = {**tokenizer.special_tokens_map, **row.chat_template_kwargs}
    texts, marks = _with_either_arguments(
        row,
        messages,
        lambda messages: render_within_limits(
            source,
            messages,
            tools=tools(row) or None,
            return_assistant_tokens_mask=True,
            **options,
        ),
    )
    return texts[0], [(start, end) for start, end in marks[0]]


def render_prompt(tokenizer: Any, source: str, row: Row, messages: Messages) -> str:
    """Render messages with the generation prompt, to be continued by an answer.

    Raises:
        UserError: the template raises; there are no messages.
    """
    if not messages:
        raise UserError(
            f"{row.where}: the conversation begins with the assistant, and a chat template needs a "
            "turn to answer"
        )
    return render(tokenizer, source, row, messages, add_generation_prompt=True)


def _with_either_arguments(
    row: Row, messages: Messages, apply: Callable[[list[dict[str, Any]]], Any]
) -> Any:
    """Return `apply(messages)`. If that fails, try again with arguments of calls as JSON text:
    some templates concatenate them to other text.
    """
    messages = list(messages)
    try:
        return apply(messages)
    except TemplateLimit as error:
        raise TemplateLimit(f"{row.where}: {error}") from error
    except Exception as error:  # the template may raise anything
        texts = [_with_argument_texts(message) for message in messages]
        if texts == messages:
            raise _refusal(row, error) from error
        try:
            return apply(texts)
        except Exception:
            raise _refusal(row, error) from error


def _with_argument_texts(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = call | {"function": function | {"arguments": text}}
        calls.append(call)
    return message | {"tool_calls": calls} if calls else message


def _refusal(row: Row, error: Exception) -> UserError:
    reason = shown(str(error) or type(error).__name__)
    return UserError(f"{row.where}: the chat template refuses this conversation: {reason}")


# Messages


def conversation(row: Row, system_prompt: str | None) -> list[dict[str, Any]]:
    """Return the messages for a template: without `train` and nulls, with the system prompt, and
    with calls in the form that templates read: {"type", "function"}.

    A content that is null or absent becomes "": most templates would write null or fail. An empty
    thought is left out: some templates would also write the thought in the content.
    """
    messages = [
        {key: value for key, value in message.items() if key != "train" and value is not None}
        for message in row.messages
    ]
    for message in messages:
        message.setdefault("content", "")
        if message.get("tool_calls"):
            message["tool_calls"] = [_as_function(call) for call in message["tool_calls"]]
        for key in REASONING:
            if not str(message.get(key, "-")).strip():
                del message[key]
    if system_prompt is not None and messages[0]["role"] not in SYSTEM_ROLES:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def with_kwargs(row: Row, chat_template_kwargs: Mapping[str, Any] | None) -> Row:
    """Return the row with more arguments for its chat template; its own take precedence."""
    if not chat_template_kwargs:
        return row
    return replace(row, chat_template_kwargs={**chat_template_kwargs, **row.chat_template_kwargs})


def tools(row: Row) -> list[Any]:
    """Return the tools of a row in the form that templates read: {"type", "function"}."""
    return [_as_function(tool) for tool in row.tools]


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool, or a call, with its name and other fields under "function"."""
    if "function" in tool:
        return {"type": "function", **tool}
    if "name" not in tool or tool.get("type", "function") != "function":
        return tool
    outer = {key: tool[key] for key in ("id", "index") if key in tool}
    inner = {key: value for key, value in tool.items() if key not in ("type", "id", "index")}
    return {**outer, "type": "function", "function": inner}


def content(message: dict[str, Any]) -> str:
    """Return the content of a message, "" if it is null or absent."""
    return message.get("content") or ""


# Tokenizers


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of special and added tokens, except those that are only whitespace."""
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {t: i for t, i in (tokens | tokenizer.get_added_vocab()).items() if t.strip()}


def tokenizer_name(tokenizer: Any) -> str:
    """Return the quoted name of a tokenizer for error messages."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
