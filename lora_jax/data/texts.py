"""Rows to text with its supervised characters; rows that would lose a part are refused.

A row is refused if the answer cannot be separated from its prompt (`lora_jax.data.spans`), or if a
part of it would be lost, moved or repeated (`lora_jax.data.probe`). Parts are every turn of the
context, every thought and call of an answer, and the tools. The error names changes to the row that
were tried and work (`lora_jax.data.advice`). Special tokens in a content are tokenised as such;
supervision does not depend on them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.data.advice import advice
from lora_jax.data.chat_templates import Template
from lora_jax.data.probe import (
    Finding,
    findings,
    has_thought,
    holds,
    lost_in_order,
    opened_thoughts,
    opens_thought,
    probe,
    squeeze,
)
from lora_jax.data.render import PLAIN, Rendering, content, conversation
from lora_jax.data.rows import REASONING, SYSTEM_ROLES, Row, TextRow
from lora_jax.data.spans import (
    Chat,
    Refused,
    Span,
    ends_answer,
    render_with_marks,
    supervised_spans,
)
from lora_jax.errors import UserError

_OPENING = 64  # characters at the end of a prompt that an answer may begin with
_MOST_SHAPES = 5000  # conversation shapes whose findings are cached


@dataclass(frozen=True)
class Text:
    """A row as text; positions count its characters."""

    text: str
    spans: list[Span]  # supervised, in order
    prompt_end: int  # start of the last supervised turn
    closing: frozenset[int]  # tokens that end an answer; EOS is added after any other
    bos: bool  # put BOS first if the tokenizer would; False for templates, which write their own
    empty: bool = False  # an answer has no text, thought or call: only its end is supervised
    unended: bool = False  # an answer before the last one has no end that could be supervised


def to_text(row: Row | TextRow, rendering: Rendering, template: Template | None) -> Text:
    """Return the text of a row with its supervised spans; without a template as plain text.

    Raises:
        UserError: no text is supervised; the template refuses the conversation, leaves a part of
            it out, or renders it so that an answer cannot be separated from its prompt.
    """
    if isinstance(row, TextRow):
        if not row.text:
            raise UserError(f"{row.where}: no token is supervised: the text is empty")
        return Text(row.text, [(0, len(row.text))], 0, _eos(rendering.tokenizer), bos=True)

    def works(changed: Row) -> bool:
        try:
            _to_text(changed, rendering, template)
        except UserError:
            return False
        return True

    try:
        return _to_text(row, rendering, template)
    except Refused as error:
        # Rows of one shape are refused alike: remedies are tried for the first of them only.
        shape = _shape(row, probe(row.messages)[0])
        known = template.known if template else {}
        if (error.cause, shape) not in known:
            known[error.cause, shape] = advice(row, works)
        raise UserError(f"{error}; {known[error.cause, shape]}") from error


def _to_text(row: Row, rendering: Rendering, template: Template | None) -> Text:
    tokenizer = rendering.tokenizer
    messages = conversation(row, rendering.system_prompt)
    shift = len(messages) - len(row.messages)
    trained = [
        shift + i
        for i, message in enumerate(row.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]
    if not trained:
        raise UserError(unsupervised(row.where))
    _check_thoughts(row)
    # Cut here, so that the last supervised turn is rendered as the last one, as after generation.
    messages = messages[: trained[-1] + 1]
    if template is None:
        return _plain(row, messages, tokenizer)
    marked_copy, parts = probe(messages)
    try:
        text, marks = render_with_marks(tokenizer, template, row, messages)
        chat = Chat(tokenizer, template, row, messages, shift, text, marks, parts)
        _check_shape(chat, marked_copy, trained)
        turns = supervised_spans(chat, trained)
    except Refused:
        raise
    except UserError as error:  # raised by the template
        raise Refused(str(error), "refuses") from error
    for i, spans in turns:
        _check_answer(chat, i, spans)
    _check_order(chat, trained)
    spans = [span for _, turn in turns for span in turn]
    return Text(
        text[: spans[-1][1]],
        spans,
        turns[-1][1][0][0],
        template.closing,
        bos=False,
        empty=any(_is_empty(messages[i]) for i in trained),
        unended=any(not ends_answer(chat, spans[-1]) for i, spans in turns[:-1]),
    )


def unsupervised(where: str) -> str:
    """Return the error text for a conversation without a supervised token."""
    return f'{where}: no token is supervised: the answer is empty, or marked "train": false'


def _check_thoughts(row: Row) -> None:
    for i, message in enumerate(row.messages):
        keys = [key for key in REASONING if str(message.get(key) or "").strip()]
        if message["role"] == "assistant" and keys and has_thought(content(message)):
            raise Refused(
                f"{row.where}: turn {i} has a thought in its {keys[0]} and another in its content, "
                "and a template would drop one or write both: keep one",
                "two thoughts",
            )


def _shape(row: Row, marked_copy: Sequence[Any]) -> str:
    """Return a key of everything that decides which parts of a row a template writes."""
    train = [message.get("train", True) for message in row.messages]
    return repr((marked_copy, train, dataclasses.replace(row, messages=(), where="")))


def _is_empty(message: dict[str, Any]) -> bool:
    texts = [content(message), *(str(message.get(key, "")) for key in REASONING)]
    return not (message.get("tool_calls") or "".join(texts).strip())


def _eos(tokenizer: Any) -> frozenset[int]:
    return frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)


def _plain(row: Row, messages: list[dict[str, Any]], tokenizer: Any) -> Text:
    """Join a prompt and a completion without a chat template."""
    roles = [m["role"] for m in messages if m["role"] not in SYSTEM_ROLES]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} joins one prompt and one completion, "
            f"but the row has the turns {', '.join(roles)}"
        )
    if row.tools or messages[-1].get("tool_calls"):
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} has no place for the row's tools"
        )
    if thoughts := [key for key in REASONING if messages[-1].get(key)]:
        raise UserError(
            f"{row.where}: data.chat_template={PLAIN!r} has no place for the {thoughts[0]}; write "
            "it into the content"
        )
    text = "".join(map(content, messages))
    start = len(text) - len(content(messages[-1]))
    empty = not text[start:].strip()
    return Text(text, [(start, len(text))], start, _eos(tokenizer), bos=True, empty=empty)


# Parts that a template loses, repeats or moves


def _check_shape(chat: Chat, marked_copy: list[dict[str, Any]], trained: Sequence[int]) -> None:
    """Raise if the template loses, repeats or moves parts of conversations of this shape."""
    key = ("shape", _shape(chat.row, marked_copy))
    if len(chat.template.known) > _MOST_SHAPES:
        chat.template.known.clear()
    if key not in chat.template.known:
        chat.template.known[key] = _find_defect(chat, marked_copy, trained)
    found = chat.template.known[key]
    if found == "tools":
        raise chat.error("leaves out the tools of the row")
    if found:
        raise _defect_error(chat, found)
    for tool in chat.row.tools:
        name = str((tool.get("function") or tool).get("name") or "")
        if name not in chat.text:
            raise chat.error(f"leaves out the tool {name!r}")


def _find_defect(
    chat: Chat, marked_copy: list[dict[str, Any]], trained: Sequence[int]
) -> Finding | str | None:
    """Return the first defect of the rendered probe, or "tools" if these are left out."""
    try:
        text, marks = render_with_marks(chat.tokenizer, chat.template, chat.row, marked_copy)
    except UserError:  # it depends on the texts; the row itself is searched
        return None
    copy = dataclasses.replace(chat, messages=marked_copy, text=text, marks=marks)
    if chat.row.tools:
        try:
            if copy.render(len(marked_copy), tools=None) == text:
                return "tools"
        except UserError:  # it requires tools
            pass
    try:
        spans = dict(supervised_spans(copy, trained))
    except UserError:  # raised again for the row itself
        spans = None
    return findings(text, chat.parts, trained, spans)


def _defect_error(chat: Chat, found: Finding) -> UserError:
    message = chat.messages[found.turn]
    labels = list(dict.fromkeys(chat.parts[i].label for i in found.parts))
    # A lost call includes its keys and arguments.
    labels = [one for one in labels if not any(one.endswith(f" of {two}") for two in labels)]
    named = " and ".join(labels)
    if found.kind == "lost" and message["role"] in SYSTEM_ROLES:
        return chat.error(f"leaves out the {message['role']} turn")
    if found.kind == "lost":
        later = message["role"] == "assistant" and found.turn < len(chat.messages) - 1
        or_rewrites = ", or rewrites it when others follow" if later else ""
        return chat.error(
            f"leaves out {named} of {chat.turn(found.turn)}, wholly or in part{or_rewrites}"
        )
    if found.kind == "repeated":
        return chat.error(f"repeats {named} of {chat.turn(found.turn)}")
    if found.kind == "moved":
        return chat.error(f"moves parts of {chat.turn(found.turn)} behind later turns")
    other = chat.turn(chat.parts[found.parts[0]].turn)
    return chat.error(f"mixes {named} of {other} with the answer of {chat.turn(found.turn)}")


def _check_order(chat: Chat, trained: Sequence[int]) -> None:
    if found := lost_in_order(chat.text, chat.parts, trained):
        raise _defect_error(chat, found)


def _check_answer(chat: Chat, i: int, spans: list[Span]) -> None:
    """Raise if the supervised spans of turn `i` lack a part of it, or repeat its thought."""
    message, text = chat.messages[i], chat.text
    begin = spans[0][0]
    answer = "".join(text[start:end] for start, end in spans)
    before = text[max(0, begin - _OPENING) : begin].rstrip()
    said = _after_prompt(content(message).strip(), before)
    lost = [] if squeeze(said) in squeeze(answer) else ["the content"]
    in_content = ("the content", "the thought")
    own = [part for part in chat.parts if part.turn == i and part.label not in in_content]
    lost += [part.label for part in own if not holds(answer, part.value)]
    if lost:
        named = " and ".join(dict.fromkeys(lost))
        later = ", or rewrites it when others follow" if i < len(chat.messages) - 1 else ""
        raise chat.error(f"leaves out {named} of {chat.turn(i)}, wholly or in part{later}")
    # An empty thought, or one that the prompt opens, was written by the template.
    written = opened_thoughts(answer) + opens_thought(before)
    given = any(part.thought for part in own)
    if written > max(1, opened_thoughts(content(message)) + given):
        raise chat.error(f"repeats the thought of {chat.turn(i)}")


def _after_prompt(answer: str, prompt: str) -> str:
    """Return an answer without a prefix that already ends the prompt, such as "<think>"."""
    sizes = range(min(len(answer), len(prompt)), 0, -1)
    return answer[next((n for n in sizes if prompt.endswith(answer[:n])), 0) :]
