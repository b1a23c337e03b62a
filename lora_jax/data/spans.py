"""Rows to text, with the characters of it that are supervised.

    <|im_start|>user\\n 2+2? <|im_end|>\\n <|im_start|>assistant\\n 4 <|im_end|> \\n
    |-------------------- generation prompt ---------------------|- supervised -|

The answer of a turn begins where the generation prompt for the turns before it ends: both are
rendered, and the prompt must begin the conversation. It ends where the conversation up to it ends,
with its end-of-turn token and without the whitespace after it. What a template adds to the last
turn of any conversation (an empty thought before it, EOS after it) may be missing in the middle.

A template with `{% generation %}` blocks says itself what is generated. Its blocks win, but no text
of the generation prompt is supervised, and the special tokens that end a turn right after its block
are. So conversations are accepted whose history the template rewrites.

A middle answer without an end mark ends in the special token that follows it: the mark of the next
role, at which a generation stops.

A row is refused where neither separates the answer from its prompt, and where a part of it would be
lost, moved or repeated (`lora_jax.data.probe`): every turn of the context, every thought and call
of an answer, the tools. The error names changes to the row that were tried
(`lora_jax.data.advice`). Special tokens in a content are tokenised as such; what is supervised
does not depend on them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lora_jax.data.advice import advice
from lora_jax.data.probe import (
    Finding,
    Part,
    findings,
    has_thought,
    holds,
    lost_in_order,
    opened_thoughts,
    opens_thought,
    probe,
    squeeze,
)
from lora_jax.data.render import (
    PLAIN,
    Template,
    content,
    conversation,
    render,
    render_marked,
    render_prompt,
)
from lora_jax.data.rows import REASONING, SYSTEM_ROLES, Row, TextRow
from lora_jax.errors import UserError

_OPENING = 64  # characters at the end of a prompt that an answer may begin with
_MOST_SHAPES = 5000  # of conversations, whose findings are kept

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """A row as text; positions count its characters."""

    text: str
    spans: list[Span]  # supervised, in order
    prompt_end: int  # where the last supervised turn begins
    closing: frozenset[int]  # tokens that end an answer; EOS is added where there is none
    bos: bool  # BOS goes before it where the tokenizer would add it; templates write their own
    empty: bool = False  # an answer has no text, thought or call: its end alone is supervised
    unended: bool = False  # an answer before the last one has no end that could be supervised


class _Refused(UserError):
    """A refusal of a row, still without a remedy; `cause` names its kind."""

    def __init__(self, text: str, cause: str):
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True)
class _Chat:
    """A conversation up to its last supervised turn, as a template renders it."""

    tokenizer: Any
    template: Template
    row: Row
    messages: list[dict[str, Any]]
    shift: int  # messages before the row's own
    text: str
    marks: list[Span]  # {% generation %} blocks
    parts: list[Part]

    def render(self, count: int, **options: Any) -> str:
        messages = self.messages[:count]
        return render(self.tokenizer, self.template.source, self.row, messages, **options)

    def prompt(self, i: int) -> str:
        return render_prompt(self.tokenizer, self.template.source, self.row, self.messages[:i])

    def error(self, text: str) -> UserError:
        return _Refused(f"{self.row.where}: the chat template {text}", text.split(" ", 1)[0])

    def turn(self, i: int) -> str:
        return f"turn {i - self.shift}" if i >= self.shift else "data.system_prompt"


def to_text(
    row: Row | TextRow, tokenizer: Any, template: Template | None, system_prompt: str | None
) -> Text:
    """The text of a row and what of it is supervised; without a template as plain text.

    Raises:
        UserError: nothing is to be supervised; the template refuses the conversation, leaves a
            part of it out, or renders it so that an answer cannot be told from its prompt.
    """
    if isinstance(row, TextRow):
        if not row.text:
            raise UserError(f"{row.where}: no token is supervised: the text is empty")
        eos = frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
        return Text(row.text, [(0, len(row.text))], 0, eos, bos=True)

    def works(changed: Row) -> bool:
        try:
            _to_text(changed, tokenizer, template, system_prompt)
        except UserError:
            return False
        return True

    try:
        return _to_text(row, tokenizer, template, system_prompt)
    except _Refused as error:
        # Rows of one shape are refused alike: what helps one of them is tried once.
        shape = _shape(row, probe(row.messages)[0])
        known = template.known if template else {}
        if (error.cause, shape) not in known:
            known[error.cause, shape] = advice(row, works)
        raise UserError(f"{error}; {known[error.cause, shape]}") from error


def _to_text(
    row: Row, tokenizer: Any, template: Template | None, system_prompt: str | None
) -> Text:
    messages = conversation(row, system_prompt)
    shift = len(messages) - len(row.messages)
    trained = [
        shift + i
        for i, message in enumerate(row.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]
    if not trained:
        raise UserError(unsupervised(row.where))
    _check_thoughts(row)
    # Cut here, so that the last supervised turn is rendered as the last: as after a generation.
    messages = messages[: trained[-1] + 1]
    if template is None:
        return _plain(row, messages, tokenizer)
    marked_copy, parts = probe(messages)
    try:
        text, marks = _rendered(tokenizer, template, row, messages)
        chat = _Chat(tokenizer, template, row, messages, shift, text, marks, parts)
        _check_shape(chat, marked_copy, trained)
        turns = _turns(chat, trained)
    except _Refused:
        raise
    except UserError as error:  # the template's own
        raise _Refused(str(error), "refuses") from error
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
        unended=any(not _ends(chat, spans[-1]) for i, spans in turns[:-1]),
    )


def _check_thoughts(row: Row) -> None:
    for i, message in enumerate(row.messages):
        keys = [key for key in REASONING if str(message.get(key) or "").strip()]
        if message["role"] == "assistant" and keys and has_thought(content(message)):
            raise _Refused(
                f"{row.where}: turn {i} has a thought in its {keys[0]} and another in its content, "
                "and one would be lost or follow the other: keep one",
                "two thoughts",
            )


def _rendered(
    tokenizer: Any, template: Template, row: Row, messages: list[dict[str, Any]]
) -> tuple[str, list[Span]]:
    if template.marked:
        return render_marked(tokenizer, template.source, row, messages)
    return render(tokenizer, template.source, row, messages), []


def _turns(chat: _Chat, trained: Sequence[int]) -> list[tuple[int, list[Span]]]:
    """Return the supervised spans of each trained turn."""
    return list((_marked_spans if chat.template.marked else _split_spans)(chat, trained))


def _shape(row: Row, marked_copy: Sequence[Any]) -> str:
    """Return a key of all that decides which parts of a row a template writes."""
    train = [message.get("train", True) for message in row.messages]
    return repr((marked_copy, train, dataclasses.replace(row, messages=(), where="")))


def _is_empty(message: dict[str, Any]) -> bool:
    texts = [content(message), *(str(message.get(key, "")) for key in REASONING)]
    return not (message.get("tool_calls") or "".join(texts).strip())


def unsupervised(where: str) -> str:
    return f'{where}: no token is supervised: the answer is empty, or marked "train": false'


def _plain(row: Row, messages: list[dict[str, Any]], tokenizer: Any) -> Text:
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
    eos = frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
    empty = not text[start:].strip()
    return Text(text, [(start, len(text))], start, eos, bos=True, empty=empty)


# By the generation prompt


def _split_spans(chat: _Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    for i in trained:
        prompt = chat.prompt(i)
        if not chat.text.startswith(prompt):
            raise _differs(chat, i, prompt)
        end = _turn_end(chat, i, len(prompt))
        if end is None:
            raise chat.error(f"rewrites {chat.turn(i)} when others follow")
        yield i, [(len(prompt), _with_end(chat, i, len(prompt), end))]


def _turn_end(chat: _Chat, i: int, start: int) -> int | None:
    """Return the end of turn `i`, which begins at `start`, in the text; None if it is not found."""
    text, template = chat.text, chat.template
    if i == len(chat.messages) - 1:
        return max(start, len(text.rstrip()))
    turn = chat.render(i + 1).rstrip()
    if text.startswith(turn):
        return max(start, len(turn))
    if not template.ending or not turn.startswith(text[:start]):
        return None
    # Around the sample the template wrote it too, so it says nothing of this answer.
    bare = turn[start:].removeprefix(template.head).removesuffix(template.tail).lstrip()
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    whole = bare.endswith(template.ending) and text.startswith(bare, begin)
    return begin + len(bare) if whole else None


def _with_end(chat: _Chat, i: int, start: int, end: int) -> int:
    """`end`, or the end of the special token that follows an answer without an end of its own:
    some templates write EOS between turns alone, or nothing but the mark of the next role.
    """
    token = chat.template.token
    if token is None or i == len(chat.messages) - 1 or _ends(chat, (start, end)):
        return end
    gap = len(chat.text[end:]) - len(chat.text[end:].lstrip())
    following = token.match(chat.text, end + gap)
    return following.end() if following else end


def _ends(chat: _Chat, span: Span) -> bool:
    """Return True if the supervised span of an answer ends in a token that ends answers."""
    eos = chat.tokenizer.eos_token
    ends = (*chat.template.ends, eos) if eos else chat.template.ends
    return chat.text[span[0] : span[1]].endswith(ends)


# By {% generation %} blocks


def _marked_spans(chat: _Chat, trained: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    prompts = {i: chat.prompt(i) for i in turns if i > 0 or i in trained}
    owned = _marks_by_turn(chat, turns, prompts)
    for i in trained:
        if not owned[i]:
            raise chat.error(f"has {{% generation %}} blocks, but none for {chat.turn(i)}")
        before = max((end for j in turns if j < i for _, end in owned[j]), default=0)
        begin = _marked_begin(chat, i, prompts[i], owned[i][0][0], before)
        spans = [(max(start, begin), max(end, begin)) for start, end in owned[i]]
        start, end = spans[-1]
        end = max(start, len(chat.text[:end].rstrip()))
        limit = _turn_end(chat, i, begin)
        if limit is None:
            ends = chat.text.startswith(chat.template.ending, end)
            limit = end + len(chat.template.ending) if ends else end
        # A block may stop before the end-of-turn token, which would then never be learnt.
        if not chat.template.special.sub("", chat.text[end:limit]):
            end = max(end, limit)
        yield i, [*spans[:-1], (start, _with_end(chat, i, start, end))]


def _marks_by_turn(
    chat: _Chat, turns: Sequence[int], prompts: dict[int, str]
) -> dict[int, list[Span]]:
    if all(chat.text.startswith(prompt) for prompt in prompts.values()):
        owned: dict[int, list[Span]] = {i: [] for i in turns}
        for start, end in chat.marks:
            # A block may begin in the generation prompt; that of an empty answer may be empty.
            owners = [i for i in turns if len(prompts.get(i, "")) < max(start + 1, end)]
            if owners:
                owned[owners[-1]].append((start, end))
        return owned
    # Positions tell nothing where earlier turns are rewritten. One block a turn is safe, if there
    # is one more for each further turn.
    source, row = chat.template.source, chat.row
    counts = [
        len(render_marked(chat.tokenizer, source, row, chat.messages[: i + 1])[1]) for i in turns
    ]
    if counts != list(range(1, len(turns) + 1)) or len(chat.marks) != len(turns):
        raise chat.error(
            f"rewrites earlier turns, and the {len(chat.marks)} {{% generation %}} blocks cannot "
            f"be told apart between {len(turns)} assistant turns"
        )
    return {i: [mark] for i, mark in zip(turns, chat.marks, strict=True)}


def _marked_begin(chat: _Chat, i: int, prompt: str, start: int, before: int) -> int:
    """Return the start of the answer of turn `i`, whose block begins at `start`: after its prompt.

    `before`: where the blocks of earlier turns end.
    """
    if chat.text.startswith(prompt):
        return max(start, len(prompt))
    # What stands before the turn is rewritten; what the prompt adds to it must stand there still.
    opening = prompt[len(commonprefix([prompt, chat.render(i)])) :]
    near = chat.text.find(opening, max(before, start - len(opening)), start + len(opening))
    if near >= 0:
        return max(start, near + len(opening))
    if chat.text.find(opening, before, start) >= 0:
        return start
    raise _differs(chat, i, prompt)


def _differs(chat: _Chat, i: int, prompt: str) -> UserError:
    same = len(commonprefix([chat.text, prompt]))
    return chat.error(
        f"renders what stands before {chat.turn(i)} differently as a prompt and inside the "
        f"conversation: {prompt[same:][:40]!r} and {chat.text[same:][:40]!r}. So the answer cannot "
        "be told from its prompt"
    )


# What must not be lost


def _check_shape(chat: _Chat, marked_copy: list[dict[str, Any]], trained: Sequence[int]) -> None:
    """Raise where the template loses, repeats or moves parts of conversations of this shape."""
    key = ("shape", _shape(chat.row, marked_copy))
    if len(chat.template.known) > _MOST_SHAPES:
        chat.template.known.clear()
    if key not in chat.template.known:
        chat.template.known[key] = _find(chat, marked_copy, trained)
    found = chat.template.known[key]
    if found == "tools":
        raise chat.error("leaves out the tools of the row")
    if found:
        raise _defect(chat, found)
    for tool in chat.row.tools:
        name = str((tool.get("function") or tool).get("name") or "")
        if name not in chat.text:
            raise chat.error(f"leaves out the tool {name!r}")


def _find(
    chat: _Chat, marked_copy: list[dict[str, Any]], trained: Sequence[int]
) -> Finding | str | None:
    try:
        text, marks = _rendered(chat.tokenizer, chat.template, chat.row, marked_copy)
    except UserError:  # the texts matter to it; the row itself is searched
        return None
    copy = dataclasses.replace(chat, messages=marked_copy, text=text, marks=marks)
    if chat.row.tools:
        try:
            if copy.render(len(marked_copy), tools=None) == text:
                return "tools"
        except UserError:  # it cannot do without them
            pass
    try:
        spans = dict(_turns(copy, trained))
    except UserError:  # raised again, for the row itself
        spans = None
    return findings(text, chat.parts, trained, spans)


def _defect(chat: _Chat, found: Finding) -> UserError:
    message = chat.messages[found.turn]
    labels = list(dict.fromkeys(chat.parts[i].label for i in found.parts))
    # A call that is lost is lost with its keys and arguments.
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


def _check_order(chat: _Chat, trained: Sequence[int]) -> None:
    if found := lost_in_order(chat.text, chat.parts, trained):
        raise _defect(chat, found)


def _check_answer(chat: _Chat, i: int, spans: list[Span]) -> None:
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
    # An empty thought, or one that the prompt opens, is the template's own.
    written = opened_thoughts(answer) + opens_thought(before)
    given = any(part.thought for part in own)
    if written > max(1, opened_thoughts(content(message)) + given):
        raise chat.error(f"repeats the thought of {chat.turn(i)}")


def _after_prompt(answer: str, prompt: str) -> str:
    """An answer without its beginning that ends the prompt, as "<think>" may do."""
    sizes = range(min(len(answer), len(prompt)), 0, -1)
    return answer[next((n for n in sizes if prompt.endswith(answer[:n])), 0) :]
