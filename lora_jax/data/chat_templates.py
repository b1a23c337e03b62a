"""Chat templates and the text that they write around an answer, found by rendering samples.

<|im_start|>assistant\\n <think>\\n\\n</think>\\n\\n sample-answer <|im_end|> \\n
                         head                                       ending    tail
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lora_jax.data.dates import check_repeatable, with_date
from lora_jax.data.render import (
    Messages,
    Rendering,
    render,
    render_prompt,
    resolve_template,
    special_tokens,
    tokenizer_name,
    with_kwargs,
)
from lora_jax.data.rows import Row
from lora_jax.data.sandbox import TemplateLimit
from lora_jax.errors import UserError

_QUESTION, _ANSWER = "sample-question", "sample-answer"
_THOUGHT, _NAME, _FOLLOWER = "sample-thought", "sample_name", "sample-follower"
# Tags of Jinja. The text between one of group 1 and one of group 2 is rendered separately and
# inserted later, so positions that transformers counts in there are not positions in the result.
_TAGS = re.compile(
    r"\{%[-+]?\s*(?:"
    r"(macro|call|filter|set(?=\s+[\w.]+\s*(?:\|[^%=]*)?[-+]?%\}))"
    r"|(endmacro|endcall|endfilter|endset)"
    r"|(generation))\b"
)

_TEMPLATES: WeakKeyDictionary[Any, dict[Any, "Template"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Template:
    """The source of a chat template, and the text that it writes around a sample answer."""

    source: str
    marked: bool  # it has {% generation %} blocks
    head: str  # between the generation prompt and the content
    ending: str  # from the content to the end of the first special token; "" without one
    tail: str  # after `ending`
    special: re.Pattern[str]  # a special token or whitespace
    token: re.Pattern[str] | None  # a special token
    ends: tuple[str, ...]  # special tokens that end an answer, as `_end_tokens` finds them
    closing: frozenset[int]  # ids of `ends`, of EOS, and of the tokens in `ending` and `tail`
    known: dict[Any, Any] = field(default_factory=dict)  # findings about rows, by their shape


def find_template(row: Row, rendering: Rendering) -> Template | None:
    """Return the template that renders a row, or None for plain text.

    Raises:
        UserError: a bad chat template, or one that uses randomness.
    """
    tokenizer = rendering.tokenizer
    source = resolve_template(tokenizer, rendering.chat_template, row.tools)
    if source is None:
        return None
    check_repeatable(source, tokenizer_name(tokenizer))
    arguments = with_kwargs(row, rendering.chat_template_kwargs).chat_template_kwargs
    return _find_template(tokenizer, with_date(source, rendering.template_date), dict(arguments))


def _find_template(tokenizer: Any, source: str, arguments: dict[str, Any]) -> Template:
    """Return the `Template` of a source, built once per tokenizer and arguments."""
    special = special_tokens(tokenizer)
    given = json.dumps(arguments, sort_keys=True, default=str)
    key = (source, given, tuple(special.items()), tokenizer.eos_token_id)
    known = _TEMPLATES.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _build_template(tokenizer, source, special, arguments)
    return known[key]


def _build_template(
    tokenizer: Any,
    source: str,
    special: dict[str, int],
    chat_template_kwargs: Mapping[str, Any],
) -> Template:
    token = _one_of([], special) if special else None
    try:
        head, ending, tail, _ = _sample(tokenizer, source, chat_template_kwargs)
        after = [] if token is None else token.findall(ending + tail)
        ends, _ = _end_tokens(tokenizer, source, chat_template_kwargs)
        closing = frozenset(special[found] for found in [*after, *ends])
        closing |= {i for i in (tokenizer.eos_token_id,) if i is not None}
    except UserError:  # it refuses the samples, but may accept the rows
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


def stop_tokens(
    tokenizer: Any,
    chat_template: str | None = None,
    extra: Iterable[int] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> frozenset[int]:
    """Return the ids that end an answer: EOS, the end tokens of the template, and `extra`.

    The end tokens are those that the template writes after an answer or a call. If it writes none,
    the mark of the next role is taken. A tokenizer without a template is for plain texts and
    tokens, which EOS ends.

    Raises:
        UserError: a bad chat template.
    """
    found = {tokenizer.eos_token_id}
    if chat_template is not None or tokenizer.chat_template:
        template = resolve_template(tokenizer, chat_template)
        if template is not None:
            special = special_tokens(tokenizer)
            found.add(_sample(tokenizer, template, chat_template_kwargs)[3])
            ends = _end_tokens(tokenizer, template, chat_template_kwargs)[1]
            found |= {special[token] for token in ends}
    return frozenset(extra) | {i for i in found if i is not None}


# Samples


def _sample(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[str, str, str, int | None]:
    """Return `head`, `ending` and `tail` of `Template`, and the id of the token in `ending`.

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


def _end_tokens(
    tokenizer: Any, source: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[set[str], set[str]]:
    """Return (special tokens that end an answer, those of them at which generation may stop).

    Generation stops only at a token that never occurs inside an answer. The samples are answers of
    prose and of calls, in the last turn and followed by other turns. If a template writes no end
    token, the mark of the next role ends an answer, as the model generates it.
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
        found_at = [text.rfind(mark) for mark in (_THOUGHT, _ANSWER, *marks)]
        if begins := [position for position in found_at if position >= 0]:
            inner.update(token.findall(text, min(begins), max(begins)))
    found = set()
    for answer, marks in answers:
        text = sampled([answer]).rstrip()
        follower = {"role": "tool" if len(marks) else "user", "content": _FOLLOWER}
        longer = sampled([answer, follower])
        found |= _ends_of(text, longer, (marks or [_ANSWER])[-1], token, inner)
    return found, found - inner


def _sample_answer(calls: int) -> tuple[dict[str, Any], list[str]]:
    """Return an answer with that many calls (0: prose), and the texts of their arguments."""
    marks = [f"sample-argument-{i}" for i in range(calls)]
    functions = [{"name": _NAME, "arguments": {"key": mark}} for mark in marks]
    answer: dict[str, Any] = {"role": "assistant", "content": "" if calls else _ANSWER}
    if calls:
        answer["tool_calls"] = [{"type": "function", "function": one} for one in functions]
    return answer, marks


def _ends_of(
    text: str, longer: str, mark: str, token: re.Pattern[str], inner: set[str]
) -> set[str]:
    """Return the special tokens that end an answer whose last words are `mark`.

    text: a conversation that ends with the answer; longer: one that goes on after it
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
    """Render a question and `messages`; return "" if the template refuses them."""
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


def _one_of(patterns: list[str], tokens: dict[str, int]) -> re.Pattern[str]:
    # Longest first: if one special token is a prefix of another, the tokenizer takes the longer.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join([*patterns, *map(re.escape, longest_first)]))


# Marks in the source


def _marked(source: str) -> bool:
    """Return True if there are {% generation %} blocks and the positions of all can be found."""
    depth, inside = 0, []
    for opens, closes, _ in _TAGS.findall(_without_comments(source)):
        depth += bool(opens) - bool(closes)
        inside += [] if opens or closes else [depth]
    return bool(inside) and not any(inside)


def _without_comments(source: str) -> str:
    """Return the source without its comments, and without the rest after an unclosed one."""
    kept, start = [], 0
    while (opens := source.find("{#", start)) >= 0:
        kept.append(source[start:opens])
        start = source.find("#}", opens + 2) + 2
        if start < 2:
            return "".join(kept)
    return "".join([*kept, source[start:]])
