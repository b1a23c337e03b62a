"""Chat templates: where they come from, what they write around an answer, rendering with them.

A template is a program that others wrote: whatever it raises is reported as a refusal of the row.
`chat_template` is None for the tokenizer's own, the path of a Jinja file, or "none" for plain text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lora_jax.config import expand, read_text, shown
from lora_jax.data.keys import RESERVED, reads
from lora_jax.data.rows import REASONING, SYSTEM_ROLES, Row
from lora_jax.data.sandbox import TemplateLimit
from lora_jax.data.sandbox import render as render_within_limits
from lora_jax.errors import UserError

PLAIN = "none"
_OPTIONS = (
    "data.chat_template is null for the tokenizer's own, the path of a Jinja file, "
    f"or {PLAIN!r} for prompt and completion as they stand"
)
_QUESTION, _ANSWER = "sample-question", "sample-answer"
_THOUGHT, _NAME, _FOLLOWER = "sample-thought", "sample_name", "sample-follower"
# Tags of Jinja. What stands between the first and the second is rendered aside, and put into the
# text later: positions that transformers counts in there are none of the text.
_TAGS = re.compile(
    r"\{%[-+]?\s*(?:"
    r"(macro|call|filter|set(?=\s+[\w.]+\s*(?:\|[^%=]*)?[-+]?%\}))"
    r"|(endmacro|endcall|endfilter|endset)"
    r"|(generation))\b"
)

_TEMPLATES: WeakKeyDictionary[Any, dict[Any, "Template"]] = WeakKeyDictionary()

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Template:
    """The source of a chat template, and what it writes around the answer of a sample."""

    source: str
    marked: bool  # it has {% generation %} blocks
    head: str  # between the generation prompt and the content
    ending: str  # after the content, to the end of the first special token; "" without one
    tail: str  # after `ending`
    special: re.Pattern[str]  # a special token or whitespace
    token: re.Pattern[str] | None  # a special token
    ends: tuple[str, ...]  # special tokens that end an answer, as `end_tokens` finds them
    closing: frozenset[int]  # their ids, EOS, and those of `ending` and `tail`
    known: dict[Any, Any] = field(default_factory=dict)  # what was found of rows, by their shape


def resolve_template(
    tokenizer: Any, chat_template: str | None, tools: Sequence[dict[str, Any]] = ()
) -> str | None:
    """The source of the Jinja template, or None for plain text.

    Some tokenizers have one more template, for conversations with tools.

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
        raise UserError(f"the tokenizer of {name(tokenizer)} has no chat template; {_OPTIONS}")
    try:
        return tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several templates and none of them the default
        reason = shown(str(error))
        raise UserError(f"the tokenizer of {name(tokenizer)}: {reason}; {_OPTIONS}") from error


def template_text(tokenizer: Any, chat_template: str | None) -> str:
    """All that decides how conversations are rendered, as one text: equal texts render alike.

    A tokenizer's templates for rows with and without tools are both in it, and a tokenizer
    without any has the empty text: plain texts and tokens need none.

    Raises:
        UserError: the file cannot be read.
    """
    if chat_template is not None:
        return resolve_template(tokenizer, chat_template) or PLAIN
    own = tokenizer.chat_template or ""
    return own if isinstance(own, str) else json.dumps(own, sort_keys=True)


def read_template(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Template:
    """Return the `Template` of a source, read once for each tokenizer and arguments."""
    special = special_tokens(tokenizer)
    arguments = dict(chat_template_kwargs or {})
    given = json.dumps(arguments, sort_keys=True, default=str)
    key = (source, given, tuple(special.items()), tokenizer.eos_token_id)
    known = _TEMPLATES.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _read_template(tokenizer, source, special, arguments)
    return known[key]


def _read_template(
    tokenizer: Any,
    source: str,
    special: dict[str, int],
    chat_template_kwargs: Mapping[str, Any],
) -> Template:
    token = _one_of([], special) if special else None
    try:
        head, ending, tail, _ = sample(tokenizer, source, chat_template_kwargs)
        after = [] if token is None else token.findall(ending + tail)
        ends, _ = end_tokens(tokenizer, source, chat_template_kwargs)
        closing = frozenset(special[found] for found in [*after, *ends])
        closing |= {i for i in (tokenizer.eos_token_id,) if i is not None}
    except UserError:  # it takes other conversations, and the rows may be such
        head = ending = tail = ""
        ends = frozenset(special)
        closing = frozenset(special.values())
    return Template(
        source=source,
        marked=_marked(source),
        head=head,
        ending=ending,
        tail=tail,
        special=_one_of([r"\s"], special),
        token=token,
        ends=tuple(sorted(ends)),
        closing=closing,
    )


def sample(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[str, str, str, int | None]:
    """`head`, `ending` and `tail` of `Template`, and the id of the token that ends `ending`.

    Raises:
        UserError: the template refuses a question and an answer, with and without a system turn.
    """
    row = Row((), "a sample conversation", (), chat_template_kwargs or {})
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(tokenizer, source, row, turns).rstrip()
    except UserError:
        turns = [{"role": "system", "content": "system"}, *turns]
        text = render(tokenizer, source, row, turns).rstrip()
    start = text.rfind(_ANSWER)
    end = start + len(_ANSWER)
    try:
        prompt = render_prompt(tokenizer, source, row, turns[:-1])
    except UserError:
        prompt = ""
    head = text[len(prompt) : start] if prompt and text.startswith(prompt) else ""
    special = special_tokens(tokenizer)
    found = _one_of([], special).search(text, end) if special and start >= 0 else None
    if found is None:
        return head, "", "", None
    return head, text[end : found.end()], text[found.end() :], special[found.group()]


def end_tokens(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[set[str], set[str]]:
    """The special tokens that end an answer, and those of them at which a generation may stop, as
    no answer has them inside. Answers of prose and of calls, last or followed by others, are tried.

    A template may write no end at all. Then the mark of the next role ends an answer, as the model
    generates it.
    """
    special = special_tokens(tokenizer)
    if not special:
        return set(), set()
    token = _one_of([], special)
    sampled = partial(_sampled, tokenizer, source, chat_template_kwargs or {})
    answers = [_sample_answer(calls) for calls in (0, 1, 2)]
    inner = set()
    for answer, marks in answers:
        whole = answer | {"content": _ANSWER, "reasoning_content": _THOUGHT}
        text = sampled([whole])
        places = [text.rfind(mark) for mark in (_THOUGHT, _ANSWER, *marks)]
        if begins := [place for place in places if place >= 0]:
            inner.update(token.findall(text, min(begins), max(begins)))
    found = set()
    for answer, marks in answers:
        text = sampled([answer]).rstrip()
        follower = {"role": "tool" if len(marks) else "user", "content": _FOLLOWER}
        longer = sampled([answer, follower])
        found |= _ends_of(text, longer, (marks or [_ANSWER])[-1], token, inner)
    return found, found - inner


def _sample_answer(calls: int) -> tuple[dict[str, Any], list[str]]:
    """An answer of prose, or of some calls; and the texts of their arguments."""
    marks = [f"sample-argument-{i}" for i in range(calls)]
    functions = [{"name": _NAME, "arguments": {"key": mark}} for mark in marks]
    answer: dict[str, Any] = {"role": "assistant", "content": "" if calls else _ANSWER}
    if calls:
        answer["tool_calls"] = [{"type": "function", "function": one} for one in functions]
    return answer, marks


def _ends_of(
    text: str, longer: str, mark: str, token: re.Pattern[str], inner: set[str]
) -> set[str]:
    """The special tokens that end an answer, in a text that it ends and in one that goes on;
    `mark`: its last words.
    """
    found = set()
    if mark in text:
        after = text.rfind(mark) + len(mark)
        last = [one.group() for one in token.finditer(text, after) if one.end() == len(text)]
        found = {*last} - inner
        if mark in longer:
            open_end = longer.startswith(text) and not found
            end = len(text) if open_end else longer.rfind(mark) + len(mark)
            gap = len(longer[end:]) - len(longer[end:].lstrip())
            if next_token := token.match(longer, end + gap):
                found.add(next_token.group())
    return found


def _sampled(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any], messages: Messages
) -> str:
    """A question and `messages` as text; "" where the template refuses them."""
    tool = {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = ({"type": "function", "function": tool},) if "tool_calls" in messages[0] else ()
    turns = [{"role": "user", "content": _QUESTION}, *messages]
    try:
        row = Row((), "a sample conversation", tools, chat_template_kwargs)
        return render(tokenizer, source, row, turns)
    except TemplateLimit:
        raise
    except UserError:
        return ""


def render(tokenizer: Any, source: str, row: Row, messages: Messages, **options: Any) -> str:
    """Messages of a row as text, with the row's tools.

    Raises:
        UserError: the template raises.
    """
    given = {"tools": tools(row) or None, **row.chat_template_kwargs, **options}
    options = {**tokenizer.special_tokens_map, **given}
    texts, _ = _tried(
        row,
        messages,
        lambda messages: render_within_limits(source, messages, **options),
    )
    return texts[0]


def render_marked(
    tokenizer: Any, source: str, row: Row, messages: Messages
) -> tuple[str, list[tuple[int, int]]]:
    """The text as `render` gives it, and the characters of its {% generation %} blocks.

    Raises:
        UserError: the template raises.
    """
    options = {**tokenizer.special_tokens_map, **row.chat_template_kwargs}
    texts, marks = _tried(
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


def _tried(row: Row, messages: Messages, apply: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """Return `apply(messages)`, or with the arguments of calls as JSON text, which some templates
    join to other text.
    """
    messages = list(messages)
    try:
        return apply(messages)
    except TemplateLimit as error:
        raise TemplateLimit(f"{row.where}: {error}") from error
    except Exception as error:  # a program of somebody else's: nothing can be known of its errors
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


def render_prompt(tokenizer: Any, source: str, row: Row, messages: Messages) -> str:
    """Messages as text that the model goes on with an answer.

    Raises:
        UserError: the template raises; there are no messages.
    """
    if not messages:
        raise UserError(
            f"{row.where}: the conversation begins with the assistant, and a chat template needs a "
            "turn to answer"
        )
    return render(tokenizer, source, row, messages, add_generation_prompt=True)


def conversation(row: Row, system_prompt: str | None) -> list[dict[str, Any]]:
    """The messages for a template: without `train` and nulls, with the system prompt, and with
    calls in the form that templates read: {"type", "function"}.

    A content that is null or absent is empty, as most templates write null or fail without one. An
    empty thought is left out: with one, some templates write the thought of the content too.
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


def check_kwargs(
    tokenizer: Any, chat_template: str | None, chat_template_kwargs: Mapping[str, Any] | None
) -> None:
    """Refuse arguments that the chat template never reads, and those that the program gives it.

    Raises:
        UserError: there are some, all of them named.
    """
    if not chat_template_kwargs:
        return
    if own := sorted(RESERVED & {*chat_template_kwargs}):
        raise UserError(
            f"data.chat_template_kwargs cannot hold {', '.join(map(repr, own))}: rows and settings "
            "decide these; take it out"
        )
    source = template_text(tokenizer, chat_template)
    plain = chat_template == PLAIN
    unread = [key for key in chat_template_kwargs if plain or not reads(source, key)]
    if unread:
        raise UserError(
            f"data.chat_template_kwargs names {', '.join(map(repr, unread))}, and the chat "
            f"template of {name(tokenizer) if chat_template is None else repr(chat_template)} "
            "reads no such argument; take it out, or use another data.chat_template"
        )


def with_kwargs(row: Row, chat_template_kwargs: Mapping[str, Any] | None) -> Row:
    """Return the row with further arguments for its chat template; its own come first."""
    if not chat_template_kwargs:
        return row
    return replace(row, chat_template_kwargs={**chat_template_kwargs, **row.chat_template_kwargs})


def tools(row: Row) -> list[Any]:
    """Return the tools of a row in the form that templates read: {"type", "function"}."""
    return [_as_function(tool) for tool in row.tools]


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool, or a call of one, with its name and what goes with it under "function"."""
    if "function" in tool:
        return {"type": "function", **tool}
    if "name" not in tool or tool.get("type", "function") != "function":
        return tool
    outer = {key: tool[key] for key in ("id", "index") if key in tool}
    inner = {key: value for key, value in tool.items() if key not in ("type", "id", "index")}
    return {**outer, "type": "function", "function": inner}


def content(message: dict[str, Any]) -> str:
    return message.get("content") or ""


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special and added tokens of a tokenizer that are more than whitespace, with their ids."""
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {t: i for t, i in (tokens | tokenizer.get_added_vocab()).items() if t.strip()}


def name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _marked(source: str) -> bool:
    """Return True if there are {% generation %} blocks and the positions of all can be found."""
    depth, inside = 0, []
    for opens, closes, _ in _TAGS.findall(_without_comments(source)):
        depth += bool(opens) - bool(closes)
        inside += [] if opens or closes else [depth]
    return bool(inside) and not any(inside)


def _without_comments(source: str) -> str:
    """Return the source up to a comment without an end, and without all others."""
    kept, start = [], 0
    while (opens := source.find("{#", start)) >= 0:
        kept.append(source[start:opens])
        start = source.find("#}", opens + 2) + 2
        if start < 2:
            return "".join(kept)
    return "".join([*kept, source[start:]])


def _one_of(patterns: list[str], tokens: dict[str, int]) -> re.Pattern[str]:
    # Longest first: where one special token begins another, the tokenizer takes the longer.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join([*patterns, *map(re.escape, longest_first)]))


def _refusal(row: Row, error: Exception) -> UserError:
    reason = shown(str(error) or type(error).__name__)
    return UserError(f"{row.where}: the chat template refuses this conversation: {reason}")
